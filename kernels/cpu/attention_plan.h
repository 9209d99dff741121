// The CPU backend's attention plan: the partition of the work and the layout of the
// workspace.
//
// A *unit* is one order head of one sequence. Its keys and values are ordered, packed
// and read together. Units run in *waves*. The packed operands of all waves share one
// region of the workspace, so that memory does not grow with the number of heads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/packing.h"
#include "methods/vertical_slash.h"
#include "pbs/attention.h"
#include "pbs/workspace.h"

namespace pbs::cpu {

inline constexpr int32_t kKeyTile = 128;    // keys scored together
inline constexpr int32_t kQueryTile = 128;  // query rows attended together
// Query heads whose tiles read their lists side by side, so that each block of keys and
// values is loaded into the second-level cache once.
inline constexpr int32_t kSharedTiles = 4;
// Approximate bytes of a wave's packed operands.
inline constexpr int64_t kWaveBytes = 32 << 20;
inline constexpr int32_t kLanePad = 16;  // column counts are multiples of this

constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Unit {
  int32_t sequence = 0;
  int32_t order_head = 0;
  bool sparse = false;       // has an order or a selection
  int64_t packed_begin = 0;  // words into the wave's packed region: keys, then values
  int64_t score_begin = 0;   // floats into the wave's scoring region
  int64_t pooled_begin = 0;  // floats into the wave's pooled region
  int64_t means_begin = 0;   // words into the wave's region of means
  int64_t lines_begin = 0;   // int32 into the region of chosen lines
};

// Offsets in a unit's part of the scoring region, in floats.
struct ScoringLayout {
  int64_t proxies = 0;     // packed proxy queries [depth, proxies]
  int64_t importance = 0;  // [body]
  int64_t tile_max = 0;    // [key tiles, proxies]
  int64_t tile_sum = 0;    // [key tiles, proxies]; later the tiles' weights
  int64_t size = 0;
};

// Offsets in a unit's part of the pooled region, in floats.
struct PooledLayout {
  int64_t keys = 0;     // packed block means [head_dim, key blocks padded]
  int64_t queries = 0;  // block means [members, query blocks, head_dim]
  int64_t bands = 0;    // divisors of the bands' logits [members, 2]
  int64_t folded = 0;   // packed strided keys [stride x head_dim, FoldedColumns()]
  int64_t columns = 0;  // packed chosen keys, then values, by member, GatheredBlocks()
  int64_t size = 0;
};

struct Wave {
  int32_t first_unit = 0;
  int32_t num_units = 0;
  // Prefix sums over the wave's units, [num_units + 1] each.
  std::vector<int64_t> key_tiles;  // key tiles of whole segments
  std::vector<int64_t> segments;   // whole segments, and one for the tail
  std::vector<int64_t> key_blocks;
  std::vector<int64_t> mean_blocks;
  std::vector<int64_t> query_blocks;  // x members
  std::vector<int64_t> select_items;  // x members
  std::vector<int64_t> query_tiles;   // x groups of kSharedTiles members
};

// What a scorer reads beside queries and keys, and how much of a head an item has.
struct ScorerNeeds {
  int32_t tile = 1;        // query blocks of an item
  bool key_means = false;  // of blocks
  bool query_means = false;
  bool means_by_length =
      false;  // a short block of keys has its own length, else block_size
  bool folded_keys = false;  // strided, `stride` of them side by side
};

struct CpuAttentionPlan final : AttentionPlan {
  OperandFormat format;
  int32_t depth = 0;        // words of a row of head_dim elements
  int32_t num_members = 0;  // query heads per order head
  int32_t tiles_per_block = 0;
  int32_t query_tile = 0;   // rows
  int32_t tile_groups = 0;  // groups of members, per query block
  ScorerNeeds scorer;
  bool corrects = false;  // adds the means of unselected blocks
  bool gathers = false;   // reads chosen columns, and parts of the listed blocks
  int32_t num_workers = 0;
  std::vector<Unit> units;
  std::vector<Wave> waves;
  std::vector<int64_t>
      row_entries;  // [total_query_blocks] first entry, relative to the head's first
  // [sequences + 1] rows per head that are sampled for coverage in earlier sequences.
  std::vector<int64_t> sampled_before;

  // Workspace offsets in bytes.
  int64_t positions_at = 0;  // int32 [num_order_heads, total_slots]
  // int32 [num_order_heads, key blocks, 2]: smallest and largest position
  int64_t block_range_at = 0;
  int64_t first_block_at = 0;  // int32 [units] block of key 0
  int64_t unit_dense_at = 0;   // uint8 [units] 1: ran with lists of all blocks
  // uint8 [sequences, num_heads] 1: reads every block because of coverage_min
  int64_t guarded_at = 0;
  int64_t counts_at = 0;    // uint16 [num_heads, query blocks]
  int64_t entries_at = 0;   // uint16
  int64_t lines_at = 0;     // int32, by unit: LinesOf() each
  int64_t coverage_at = 0;  // double [num_heads, sampled rows of all sequences]
  int64_t times_at = 0;     // double [3]
  int64_t packed_at = 0;
  int64_t scoring_at = 0;
  int64_t pooled_at = 0;
  int64_t means_at = 0;
  int64_t scratch_at = 0;  // [num_workers] of scratch_bytes
  int64_t scratch_bytes = 0;

  int32_t NumProxies(const SequenceGeometry& s) const {
    return s.q_len < geometry.block_size ? s.q_len : geometry.block_size;
  }
  int32_t Body(const SequenceGeometry& s) const {
    return s.k_len / geometry.segment_size * geometry.segment_size;
  }
  // True when this plan scores the keys of `unit` and computes its order.
  bool ComputesOrder(const Unit& unit) const {
    return unit.sparse && Permutes(problem.options) && !problem.options.use_given_order;
  }
  bool SelectsBlocks(const Unit& unit) const {
    return unit.sparse && !problem.options.use_given_lists;
  }
  ScoringLayout Scoring(const SequenceGeometry& s) const;
  PooledLayout Pooled(const SequenceGeometry& s) const;
  // Strided keys of a sequence, padded.
  int64_t FoldedColumns(const SequenceGeometry& s) const {
    const int64_t per_block = geometry.block_size / problem.options.stride;
    return RoundUp(s.num_key_blocks * per_block, kLanePad);
  }
  // Chosen columns and distances of a head, and the blocks that the columns fill.
  int32_t Columns(const SequenceGeometry& s) const {
    return NumColumns(problem.options.vertical_tokens, s.k_len);
  }
  int32_t Distances(const SequenceGeometry& s) const {
    return NumDistances(problem.options.slash_tokens, s.k_len);
  }
  // Numbers of a unit's lines: columns by member, then distances by member.
  int64_t LinesOf(const Unit& unit) const {
    const SequenceGeometry& s = geometry.sequences[unit.sequence];
    const int64_t of_a_head = Columns(s) + Distances(s);
    return gathers && unit.sparse ? num_members * of_a_head : 0;
  }
  // Where the lines of query head `member` of `unit` begin, in int32 from lines_at.
  int64_t ColumnsAt(const Unit& unit, int32_t member) const {
    const SequenceGeometry& s = geometry.sequences[unit.sequence];
    return unit.lines_begin + int64_t{member} * Columns(s);
  }
  int64_t DistancesAt(const Unit& unit, int32_t member) const {
    const SequenceGeometry& s = geometry.sequences[unit.sequence];
    return unit.lines_begin + int64_t{num_members} * Columns(s) +
           int64_t{member} * Distances(s);
  }
  int32_t GatheredBlocks(const SequenceGeometry& s) const {
    return (Columns(s) + geometry.block_size - 1) / geometry.block_size;
  }
  // Blocks that the means of a sequence's key blocks fill, a key each.
  int32_t MeanBlocks(const SequenceGeometry& s) const {
    return (s.num_key_blocks + geometry.block_size - 1) / geometry.block_size;
  }
  // Words of a unit's means: rows of keys, rows of values, then both packed.
  int64_t MeansWords(const SequenceGeometry& s) const {
    const int64_t rows = int64_t{MeanBlocks(s)} * geometry.block_size;
    return 2 * rows * geometry.head_dim + 2 * rows * depth;
  }
  // Words of the packed keys of one unit. The values take as many.
  int64_t PackedWords(const SequenceGeometry& s) const {
    return static_cast<int64_t>(s.num_key_blocks) * geometry.block_size * depth;
  }
};

// Requires ValidateProblem(problem).ok().
std::unique_ptr<CpuAttentionPlan> MakeCpuPlan(const AttentionProblem& problem,
                                              OperandFormat format, int num_workers);

}  // namespace pbs::cpu
