// The order in which attention takes its tiles. Tiles with the longest lists come
// first, so that no long tile begins last. Tiles are ordered inside sections, so that
// tiles that read the same keys run at the same time.
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/order_tiles_params.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/tiles/warp_sums.h"

namespace pbs::cuda {

// Grid [1] or [num_order_heads, num_sequences], 512 threads; dynamic shared memory:
// SharedBytes().
//
// It is a counting sort in three passes: count the lists of each length, compute where
// each length begins, put tiles in their places. Only the last pass makes tiles and
// counts the blocks that they read.
class OrderTiles {
 public:
  static constexpr int kThreads = 512;

  PBS_HOST_DEVICE static constexpr int SharedBytes(const TileOrderParams& params) {
    return kWarps * 8 + 2 * HeadsOfSection(params) * 4 + (params.longest + 1) * 4;
  }

  PBS_DEVICE static void Run(const TileOrderParams& params) {
    OrderTiles(params).Run();
  }

 private:
  static constexpr int kWarps = kThreads / 32;

  // Query heads whose tiles a thread block orders.
  PBS_HOST_DEVICE static constexpr int HeadsOfSection(const TileOrderParams& params) {
    return params.one_section != 0 ? params.num_heads
                                   : params.num_heads / params.num_order_heads;
  }

  // A tile's queries: the query block of a row of the lists, where there are lists.
  struct Row {
    int sequence;
    SequenceRecord s;
    int head;
    int index;       // index among the sequence's tiles
    int first;       // row of the sequence at the tile's row 0; may be negative
    int end_row;     // end of the tile's rows
    int block;       // block of row 0's position, absolute index
    int last_block;  // block of the last row's position
  };

  PBS_DEVICE explicit OrderTiles(const TileOrderParams& params)
      : params_(params),
        sums_(reinterpret_cast<int64_t*>(SharedMemory())),
        blocks_(reinterpret_cast<int32_t*>(sums_ + kWarps)),
        counts_(blocks_ + 2 * HeadsOfSection(params)) {}

  PBS_DEVICE void Run() {
    StampTime(params_.ordered);
    if (BlockIndex() == 0 && ThreadIndex() == 0) {
      StoreGlobal(params_.next_tile, 0);
      StoreGlobal(params_.tiles + params_.total_tiles, AttentionTile{});
    }
    FindSection();
    const int to_clear = 2 * HeadsOfSection(params_) + params_.longest + 1;
    for (int i = ThreadIndex(); i < to_clear; i += kThreads) {
      StoreShared(blocks_ + i, 0);
    }
    SyncThreads();
    for (int64_t row = begin_ + ThreadIndex(); row < end_; row += kThreads) {
      AtomicAddShared(counts_ + Length(row, RowAt(row)), 1);
    }
    SyncThreads();
    CountsToPlaces();
    const int lane = ThreadIndex() % 32;
    // All lanes of a warp stay in the loop.
    for (int64_t first = begin_ + ThreadIndex() - lane; first < end_;
         first += kThreads) {
      const bool there = first + lane < end_;
      CountBlocks(there ? PlaceTile(first + lane) : Blocks{});
    }
    SyncThreads();
    TellBlocks();
    if (ThreadIndex() == 0) AtomicMax(params_.listed, GlobalTimer());
  }

  // Counts of the blocks that a tile reads.
  struct Blocks {
    int head = -1;  // head in the section; -1: there is no tile
    int executed = 0;
    int above = 0;  // of them, above the diagonal
  };
  PBS_DEVICE Blocks PlaceTile(int64_t row) {
    const Row at = RowAt(row);
    int above = 0;
    const AttentionTile tile = MakeTile(row, at, &above);
    if (tile.list_begin >= 0 && params_.given_begin != nullptr) CopyGiven(row, tile);
    const int place = AtomicAddShared(counts_ + tile.list_count, 1);
    StoreGlobal(params_.tiles + begin_ + place, tile);
    return {at.head - first_head_, Executed(row, at, tile), above};
  }

  // Blocks that the row counts as executed: all gathered blocks of its head, too, but
  // no more in sum than it could read. `above` of them are above the diagonal.
  PBS_DEVICE int Executed(int64_t row, const Row& at, const AttentionTile& tile) const {
    if (!HasGathered(at)) return tile.list_count;
    const int executed = LoadGlobal(params_.counts + row) + at.s.gathered_blocks;
    return executed < OwnEndOf(at) ? executed : OwnEndOf(at);
  }

  // Adds the blocks that the lanes' tiles read to blocks_. Most warps have tiles of one
  // head.
  PBS_DEVICE void CountBlocks(Blocks blocks) {
    if (params_.heads == nullptr) return;
    const int head = Shuffle(blocks.head, 0);
    const bool same = blocks.head == head || blocks.head < 0;
    if (Ballot(same) == 0xFFFFFFFFu) {
      blocks = {head, SumOfWarp(blocks.executed), SumOfWarp(blocks.above)};
      if (ThreadIndex() % 32 != 0) return;
    }
    if (blocks.head < 0) return;
    AtomicAddShared(blocks_ + 2 * blocks.head, blocks.executed);
    AtomicAddShared(blocks_ + 2 * blocks.head + 1, blocks.executed - blocks.above);
  }
  PBS_DEVICE void TellBlocks() const {
    if (params_.heads == nullptr) return;
    for (int head = ThreadIndex(); head < HeadsOfSection(params_); head += kThreads) {
      BlockCounts* target = params_.heads + first_head_ + head;
      AtomicAdd(&target->executed, LoadShared(blocks_ + 2 * head));
      AtomicAdd(&target->lower, LoadShared(blocks_ + 2 * head + 1));
    }
  }

  // Finds the rows of the lists that this thread block orders.
  PBS_DEVICE void FindSection() {
    if (params_.one_section != 0) {
      begin_ = 0;
      end_ = params_.total_tiles;
      return;
    }
    const GridPlace place = PlaceInGrid(params_.num_sequences);
    section_sequence_ = place.item;
    const SequenceRecord s = LoadGlobal(params_.sequences + place.item);
    const int members = HeadsOfSection(params_);
    first_head_ = place.head * members;
    begin_ = FirstTile(s, first_head_);
    end_ = FirstTile(s, first_head_ + members);
    if (params_.dense_fallback != 0 && s.sparse != 0) DecideFallback(s, place);
  }

  // Decides whether this order head falls back to dense.
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
        static_cast<double>(params_.fallback_ratio) * static_cast<double>(causal);
    if (ThreadIndex() == 0) {
      StoreGlobal(params_.fell_back + place.head * params_.num_sequences + place.item,
                  falls_back_ ? 1 : 0);
    }
  }

  // counts_[n] becomes the number of tiles with longer lists.
  PBS_DEVICE void CountsToPlaces() {
    const int bins = params_.longest + 1;
    const int each = (bins + kThreads - 1) / kThreads;
    // Thread t has the t-th part, counted from the longest lists.
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

  // Sum over all threads; all threads call. sums_ may be reused after the next
  // SyncThreads().
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
  // Sum over the values that the first `warps` warps wrote.
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
      found.sequence = FindSequence<&SequenceRecord::tile_begin>(
          params_.sequences, params_.num_sequences,
          static_cast<int>(row / params_.num_heads));
    }
    found.s = LoadGlobal(params_.sequences + found.sequence);
    const int64_t local = row - FirstTile(found.s, 0);
    found.head = static_cast<int>(local / NumTiles(found.s));
    found.index = static_cast<int>(local % NumTiles(found.s));
    found.first = found.index * params_.tile_rows;
    if (OnGridOfBlocks()) found.first -= found.s.query_offset % kBlockTokens;
    const int left = found.s.q_len - found.first;
    found.end_row = left < params_.tile_rows ? left : params_.tile_rows;
    const int position = found.s.query_offset + found.first;
    found.block = position / kBlockTokens;
    found.last_block = (position + found.end_row - 1) / kBlockTokens;
    return found;
  }

  // True for tiles with lists, which begin at query blocks. Other tiles begin at the
  // sequence's first row.
  PBS_DEVICE bool OnGridOfBlocks() const { return params_.tile_rows == kTileRows; }
  PBS_DEVICE int NumTiles(const SequenceRecord& s) const {
    return OnGridOfBlocks() ? s.num_query_blocks
                            : (s.q_len + params_.tile_rows - 1) / params_.tile_rows;
  }
  PBS_DEVICE int64_t FirstTile(const SequenceRecord& s, int head) const {
    return int64_t{s.tile_begin} * params_.num_heads + int64_t{head} * NumTiles(s);
  }

  PBS_DEVICE bool HasList(const Row& at) const {
    return params_.counts != nullptr && at.s.sparse != 0;
  }
  PBS_DEVICE int OwnEndOf(const Row& at) const {
    return OwnEnd(at.block, params_.blocks_per_segment, at.s.num_key_blocks);
  }
  // Number of blocks that the row reads.
  PBS_DEVICE int Length(int64_t row, const Row& at) const {
    if (!HasList(at)) return at.last_block + 1;
    if (falls_back_) return OwnEndOf(at);
    return LoadGlobal(params_.counts + row) + Gathered(row, at);
  }
  PBS_DEVICE bool HasGathered(const Row& at) const {
    return params_.gathered != nullptr && HasList(at) && !falls_back_;
  }
  PBS_DEVICE int Gathered(int64_t row, const Row& at) const {
    return HasGathered(at) ? LoadGlobal(params_.gathered + row) : 0;
  }

  // Sets `above` to the number of the tile's blocks above the diagonal.
  PBS_DEVICE AttentionTile MakeTile(int64_t row, const Row& at, int* above) const {
    AttentionTile tile{
        .list_begin = -1,
        .list_count = Length(row, at),
        .num_masked = at.last_block + 1 - at.block,
        .last_block = at.last_block,
        .sequence = at.sequence,
        .head = at.head,
        .order_head = at.head / (params_.num_heads / params_.num_read_heads),
        .q_begin = at.s.q_begin,
        .first_query = at.first,
        .begin_row = at.first < 0 ? -at.first : 0,
        .end_row = at.end_row,
        .first_position = at.s.query_offset + at.first,
        .first_slot =
            params_.permuted != 0 ? at.s.key_block_begin * kBlockTokens : at.s.k_begin,
        .num_keys = params_.gathered != nullptr ? INT32_MAX : at.s.k_len};
    if (!HasList(at)) return tile;
    const int own = OwnBegin(at.block, params_.blocks_per_segment);
    // Selected lists contain the whole own segment.
    tile.num_masked = OwnEndOf(at) - own;
    tile.last_block = OwnEndOf(at) - 1;
    *above = OwnEndOf(at) - at.block - 1;
    if (falls_back_) return tile;
    tile.list_begin = EntryOffset(at.s, at.head, at.index, params_.blocks_per_segment);
    if (params_.gathered != nullptr) {
      tile.list_begin -= Gathered(row, at);
      tile.num_masked = tile.list_count;  // all may be read in part
    }
    if (params_.given_begin == nullptr) return tile;
    const uint16_t* end = Given(row) + tile.list_count;
    tile.last_block = LoadGlobal(end - 1);
    *above = EntriesFrom(at.block + 1, end, tile.list_count);
    tile.num_masked = EntriesFrom(own, end, tile.list_count);
    return tile;
  }

  // Number of entries that are at least `block`, of the `count` list entries before
  // `end`.
  PBS_DEVICE static int EntriesFrom(int block, const uint16_t* end, int count) {
    int entries = 0;
    while (entries < count && LoadGlobal(end - entries - 1) >= block) ++entries;
    return entries;
  }

  const TileOrderParams& params_;
  int64_t* const sums_;  // indexed by warp
  // Indexed by head of the section: executed and lower blocks.
  int32_t* const blocks_;
  int32_t* const counts_;      // indexed by length of the list: counts, later places
  int section_sequence_ = -1;  // sequence of all rows; negative: several sequences
  int first_head_ = 0;         // of the section
  int64_t begin_ = 0;
  int64_t end_ = 0;
  bool falls_back_ = false;
};

}  // namespace pbs::cuda
