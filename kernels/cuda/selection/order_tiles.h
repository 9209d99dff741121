// The order in which attention takes its tiles: longest lists first, so that no tile
// that takes long begins last; inside a section, so that tiles which read the same keys
// run side by side.
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/order_tiles_params.h"
#include "cuda/selection/sequences.h"

namespace pbs::cuda {

// Grid [1] or [num_order_heads, num_sequences], 512 threads; dynamic shared memory:
// SharedBytes(longest).
class OrderTiles {
 public:
  static constexpr int kThreads = 512;

  PBS_HOST_DEVICE static constexpr int SharedBytes(int longest) {
    return (longest + 1 + kThreads + 4) * 4;
  }

  PBS_DEVICE static void Run(const TileOrderParams& params) {
    OrderTiles(params).Run();
  }

 private:
  PBS_DEVICE explicit OrderTiles(const TileOrderParams& params)
      : params_(params),
        counts_(reinterpret_cast<int32_t*>(SharedMemory())),
        sums_(counts_ + params.longest + 1) {}

  PBS_DEVICE void Run() {
    if (BlockIndex() == 0 && ThreadIndex() == 0) {
      StoreGlobal(params_.next_tile, 0);
      StoreGlobal(params_.tiles + params_.total_tiles, AttentionTile{});
    }
    FindSection();
    for (int i = ThreadIndex(); i <= params_.longest; i += kThreads) {
      StoreShared(counts_ + i, 0);
    }
    SyncThreads();
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      const AttentionTile tile = MakeTile(row);
      if (tile.list_begin >= 0 && params_.given_begin != nullptr) CopyGiven(row, tile);
      AtomicAddShared(counts_ + tile.list_count, 1);
    }
    SyncThreads();
    CountsToPlaces();
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      const AttentionTile tile = MakeTile(row);
      const int place = AtomicAddShared(counts_ + tile.list_count, 1);
      StoreGlobal(params_.tiles + begin_ + place, tile);
    }
  }

  // Rows of the lists that this thread block orders.
  PBS_DEVICE void FindSection() {
    if (params_.one_section != 0) {
      begin_ = 0;
      end_ = params_.total_tiles;
      return;
    }
    const GridPlace place = PlaceInGrid(params_.num_sequences);
    const SequenceRecord s = LoadGlobal(params_.sequences + place.item);
    const int members = params_.num_heads / params_.num_order_heads;
    begin_ = ListRow(s, params_.num_heads, place.head * members, 0);
    end_ = begin_ + int64_t{members} * s.num_query_blocks;
    if (params_.dense_fallback != 0 && s.sparse != 0) DecideFallback(s, place);
  }

  // Whether the lists of this order head would not pay.
  PBS_DEVICE void DecideFallback(const SequenceRecord& s, const GridPlace& place) {
    int64_t executed = 0;
    int64_t causal = 0;
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      executed += LoadGlobal(params_.counts + row);
      causal += s.first_query_block + (row - begin_) % s.num_query_blocks + 1;
    }
    // Whole numbers below 2^24 blocks a thread: sums of floats would round.
    StoreShared(sums_ + ThreadIndex(), static_cast<int32_t>(executed));
    SyncThreads();
    const int64_t all_executed = SumOfSums();
    SyncThreads();
    StoreShared(sums_ + ThreadIndex(), static_cast<int32_t>(causal));
    SyncThreads();
    const int64_t all_causal = SumOfSums();
    SyncThreads();
    falls_back_ =
        static_cast<double>(all_executed) >=
        static_cast<double>(params_.fallback_density) * static_cast<double>(all_causal);
    if (ThreadIndex() == 0) {
      StoreGlobal(params_.fell_back + place.head * params_.num_sequences + place.item,
                  falls_back_ ? 1 : 0);
    }
  }
  PBS_DEVICE int64_t SumOfSums() const {
    int64_t sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += LoadShared(sums_ + i);
    return sum;
  }

  // counts_[n] becomes the number of tiles with longer lists.
  PBS_DEVICE void CountsToPlaces() {
    const int bins = params_.longest + 1;
    const int each = (bins + kThreads - 1) / kThreads;
    // Thread t has the t-th part from the longest lists on.
    const int last = bins - 1 - ThreadIndex() * each;
    int sum = 0;
    for (int i = last; i > last - each && i >= 0; --i) sum += LoadShared(counts_ + i);
    StoreShared(sums_ + ThreadIndex(), sum);
    SyncThreads();
    int place = 0;
    for (int i = 0; i < ThreadIndex(); ++i) place += LoadShared(sums_ + i);
    for (int i = last; i > last - each && i >= 0; --i) {
      const int count = LoadShared(counts_ + i);
      StoreShared(counts_ + i, place);
      place += count;
    }
    SyncThreads();
  }

  PBS_DEVICE void CopyGiven(int64_t row, const AttentionTile& tile) const {
    const uint16_t* given = Entries(row, tile);
    for (int i = 0; i < tile.list_count; ++i) {
      StoreGlobal(params_.entries + tile.list_begin + i, LoadGlobal(given + i));
    }
  }

  // Where the list of a row comes from.
  PBS_DEVICE const uint16_t* Entries(int64_t row, const AttentionTile& tile) const {
    if (params_.given_begin == nullptr) return params_.entries + tile.list_begin;
    return params_.given_entries + LoadGlobal(params_.given_begin + row);
  }

  PBS_DEVICE AttentionTile MakeTile(int64_t row) const {
    const int index = SequenceOfRow(row);
    const SequenceRecord s = LoadGlobal(params_.sequences + index);
    const int64_t local = row - ListRow(s, params_.num_heads, 0, 0);
    const int head = static_cast<int>(local / s.num_query_blocks);
    const int query_block = static_cast<int>(local % s.num_query_blocks);
    const int block = s.first_query_block + query_block;
    const int first = block * kTileRows - s.query_offset;  // row of the sequence
    AttentionTile tile{
        .list_begin = -1,
        .list_count = block + 1,
        .num_masked = 1,
        .last_block = block,
        .sequence = index,
        .head = head,
        .order_head = head / (params_.num_heads / params_.num_read_heads),
        .q_begin = s.q_begin,
        .first_query = first,
        .begin_row = first < 0 ? -first : 0,
        .end_row = s.q_len - first < kTileRows ? s.q_len - first : kTileRows,
        .first_position = block * kTileRows,
        .first_slot =
            params_.permuted != 0 ? s.key_block_begin * kBlockTokens : s.k_begin,
        .num_keys = s.k_len};
    if (params_.counts == nullptr || s.sparse == 0) return tile;
    const int own = OwnBegin(block, params_.blocks_per_segment);
    const int own_end = OwnEnd(block, params_.blocks_per_segment, s.num_key_blocks);
    if (falls_back_) {
      tile.list_count = own_end;
      tile.num_masked = own_end - own;
      tile.last_block = own_end - 1;
      return tile;
    }
    tile.list_begin = EntryOffset(s, head, query_block, params_.blocks_per_segment);
    tile.list_count = LoadGlobal(params_.counts + row);
    tile.num_masked = 0;
    const uint16_t* end = Entries(row, tile) + tile.list_count;
    tile.last_block = LoadGlobal(end - 1);
    while (tile.num_masked < tile.list_count &&
           LoadGlobal(end - tile.num_masked - 1) >= own) {
      ++tile.num_masked;
    }
    return tile;
  }

  PBS_DEVICE int SequenceOfRow(int64_t row) const {
    return FindSequence<&SequenceRecord::query_block_begin>(
        params_.sequences, params_.num_sequences,
        static_cast<int>(row / params_.num_heads));
  }

  const TileOrderParams& params_;
  int32_t* const counts_;  // by length of the list; then places
  int32_t* const sums_;    // by thread
  int64_t begin_ = 0;
  int64_t end_ = 0;
  bool falls_back_ = false;
};

}  // namespace pbs::cuda
