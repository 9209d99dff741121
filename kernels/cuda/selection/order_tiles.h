// The order in which attention takes its tiles: longest lists first, so that no tile
// that takes long begins last; inside a section, so that tiles which read the same keys
// run side by side.
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/order_tiles_params.h"
#include "cuda/selection/sequences.h"
#include "cuda/tiles/warp_sums.h"

namespace pbs::cuda {

// Grid [1] or [num_order_heads, num_sequences], 512 threads; dynamic shared memory:
// SharedBytes(longest).
//
// A counting sort: how many tiles have lists of each length, where each length begins,
// tiles to their places. Only the last pass makes tiles.
class OrderTiles {
 public:
  static constexpr int kThreads = 512;

  PBS_HOST_DEVICE static constexpr int SharedBytes(int longest) {
    return kWarps * 8 + (longest + 1) * 4;
  }

  PBS_DEVICE static void Run(const TileOrderParams& params) {
    OrderTiles(params).Run();
  }

 private:
  static constexpr int kWarps = kThreads / 32;

  // The query block of a row of the lists.
  struct Row {
    int sequence;
    SequenceRecord s;
    int head;
    int query_block;  // of the sequence
    int block;        // absolute index
  };

  PBS_DEVICE explicit OrderTiles(const TileOrderParams& params)
      : params_(params),
        sums_(reinterpret_cast<int64_t*>(SharedMemory())),
        counts_(reinterpret_cast<int32_t*>(sums_ + kWarps)) {}

  PBS_DEVICE void Run() {
    if (BlockIndex() == 0 && ThreadIndex() == 0) StoreGlobal(params_.next_tile, 0);
    FindSection();
    for (int i = ThreadIndex(); i <= params_.longest; i += kThreads) {
      StoreShared(counts_ + i, 0);
    }
    SyncThreads();
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      AtomicAddShared(counts_ + Length(row, RowAt(row)), 1);
    }
    SyncThreads();
    CountsToPlaces();
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      const AttentionTile tile = MakeTile(row, RowAt(row));
      if (tile.list_begin >= 0 && params_.given_begin != nullptr) CopyGiven(row, tile);
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
    section_sequence_ = place.item;
    const SequenceRecord s = LoadGlobal(params_.sequences + place.item);
    const int members = params_.num_heads / params_.num_order_heads;
    begin_ = ListRow(s, params_.num_heads, place.head * members, 0);
    end_ = begin_ + int64_t{members} * s.num_query_blocks;
    if (params_.dense_fallback != 0 && s.sparse != 0) DecideFallback(s, place);
  }

  // Whether the lists of this order head would not pay.
  PBS_DEVICE void DecideFallback(const SequenceRecord& s, const GridPlace& place) {
    int64_t executed = 0;
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      executed += LoadGlobal(params_.counts + row);
    }
    executed = SumOfAll(executed);
    // Row i of a head sees first_query_block + i + 1 blocks.
    const int64_t twice_a_row = 2 * s.first_query_block + s.num_query_blocks + 1;
    const int64_t causal = (end_ - begin_) * twice_a_row / 2;
    falls_back_ =
        static_cast<double>(executed) >=
        static_cast<double>(params_.fallback_density) * static_cast<double>(causal);
    if (ThreadIndex() == 0) {
      StoreGlobal(params_.fell_back + place.head * params_.num_sequences + place.item,
                  falls_back_ ? 1 : 0);
    }
  }

  // counts_[n] becomes the number of tiles with longer lists.
  PBS_DEVICE void CountsToPlaces() {
    const int bins = params_.longest + 1;
    const int each = (bins + kThreads - 1) / kThreads;
    // Thread t has the t-th part from the longest lists on.
    const int last = bins - 1 - ThreadIndex() * each;
    int sum = 0;
    for (int i = last; i > last - each && i >= 0; --i) sum += LoadShared(counts_ + i);
    auto place = static_cast<int>(SumOfThreadsBefore(sum));
    for (int i = last; i > last - each && i >= 0; --i) {
      const int count = LoadShared(counts_ + i);
      StoreShared(counts_ + i, place);
      place += count;
    }
    SyncThreads();
  }

  // All threads call; sums_ may be used again behind the next SyncThreads().
  PBS_DEVICE int64_t SumOfAll(int64_t value) const {
    TellSumOfWarp(SumOfWarp(value));
    return SumOfWarp(SumToldBy(kWarps));
  }
  PBS_DEVICE int64_t SumOfThreadsBefore(int64_t value) const {
    const int64_t with_own = SumOfLanesUpTo(value);
    TellSumOfWarp(Shuffle(with_own, 31));
    return SumOfWarp(SumToldBy(ThreadIndex() / 32)) + with_own - value;
  }
  PBS_DEVICE void TellSumOfWarp(int64_t sum) const {
    if (ThreadIndex() % 32 == 0) StoreShared(sums_ + ThreadIndex() / 32, sum);
    SyncThreads();
  }
  // What the lane's warp has told, of the first `warps`.
  PBS_DEVICE int64_t SumToldBy(int warps) const {
    const int lane = ThreadIndex() % 32;
    return lane < warps ? LoadShared(sums_ + lane) : int64_t{0};
  }

  PBS_DEVICE void CopyGiven(int64_t row, const AttentionTile& tile) const {
    const uint16_t* given = Given(row);
    for (int i = 0; i < tile.list_count; ++i) {
      StoreGlobal(params_.entries + tile.list_begin + i, LoadGlobal(given + i));
    }
  }
  PBS_DEVICE const uint16_t* Given(int64_t row) const {
    return params_.given_entries + LoadGlobal(params_.given_begin + row);
  }

  PBS_DEVICE Row RowAt(int64_t row) const {
    Row found;
    found.sequence = section_sequence_;
    if (found.sequence < 0) {
      found.sequence = FindSequence<&SequenceRecord::query_block_begin>(
          params_.sequences, params_.num_sequences,
          static_cast<int>(row / params_.num_heads));
    }
    found.s = LoadGlobal(params_.sequences + found.sequence);
    const int64_t local = row - ListRow(found.s, params_.num_heads, 0, 0);
    found.head = static_cast<int>(local / found.s.num_query_blocks);
    found.query_block = static_cast<int>(local % found.s.num_query_blocks);
    found.block = found.s.first_query_block + found.query_block;
    return found;
  }

  PBS_DEVICE bool HasList(const Row& at) const {
    return params_.counts != nullptr && at.s.sparse != 0;
  }
  PBS_DEVICE int OwnEndOf(const Row& at) const {
    return OwnEnd(at.block, params_.blocks_per_segment, at.s.num_key_blocks);
  }
  // Blocks that the row reads.
  PBS_DEVICE int Length(int64_t row, const Row& at) const {
    if (!HasList(at)) return at.block + 1;
    return falls_back_ ? OwnEndOf(at) : LoadGlobal(params_.counts + row);
  }

  PBS_DEVICE AttentionTile MakeTile(int64_t row, const Row& at) const {
    const int first = at.block * kTileRows - at.s.query_offset;  // row of the sequence
    AttentionTile tile{
        .list_begin = -1,
        .list_count = Length(row, at),
        .num_masked = 1,
        .sequence = at.sequence,
        .head = at.head,
        .order_head = at.head / (params_.num_heads / params_.num_read_heads),
        .q_begin = at.s.q_begin,
        .first_query = first,
        .begin_row = first < 0 ? -first : 0,
        .end_row = at.s.q_len - first < kTileRows ? at.s.q_len - first : kTileRows,
        .first_position = at.block * kTileRows,
        .first_slot =
            params_.permuted != 0 ? at.s.key_block_begin * kBlockTokens : at.s.k_begin,
        .num_keys = at.s.k_len};
    if (!HasList(at)) return tile;
    tile.num_masked = OwnEndOf(at) - OwnBegin(at.block, params_.blocks_per_segment);
    if (falls_back_) return tile;
    tile.list_begin =
        EntryOffset(at.s, at.head, at.query_block, params_.blocks_per_segment);
    // Our own lists hold all of the own segment.
    if (params_.given_begin != nullptr) tile.num_masked = GivenMasked(row, at, tile);
    return tile;
  }

  // Entries of a given list that lie in the own segment.
  PBS_DEVICE int GivenMasked(int64_t row, const Row& at,
                             const AttentionTile& tile) const {
    const int own = OwnBegin(at.block, params_.blocks_per_segment);
    const uint16_t* end = Given(row) + tile.list_count;
    int masked = 0;
    while (masked < tile.list_count && LoadGlobal(end - masked - 1) >= own) ++masked;
    return masked;
  }

  const TileOrderParams& params_;
  int64_t* const sums_;        // by warp
  int32_t* const counts_;      // by length of the list; then places
  int section_sequence_ = -1;  // of all rows; below 0: of several
  int64_t begin_ = 0;
  int64_t end_ = 0;
  bool falls_back_ = false;
};

}  // namespace pbs::cuda
