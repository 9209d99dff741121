// Stage 3: attention of query tiles over their block lists.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "cpu/attention_run.h"
#include "cpu/row_keys.h"

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// A worker's memory: scores of one tile, and the state of the tiles it walks with.
struct TileScratch {
  TileScratch() = default;
  TileScratch(const AttentionRun& run, int worker, int32_t slot) {
    const CpuAttentionPlan& plan = run.plan;
    const int64_t rows = plan.query_tile;
    const int64_t padded = RoundUp(rows, kLanePad);
    const int64_t block = plan.geometry.block_size;
    const int64_t dim = plan.geometry.head_dim;
    scores = static_cast<float*>(run.Scratch(worker));
    pairs = reinterpret_cast<uint32_t*>(scores + rows * block);
    float* own = scores + rows * (block + block / 2) +
                 slot * (rows * (plan.depth + dim) + 2 * padded);
    query = reinterpret_cast<uint32_t*>(own);
    out = own + rows * plan.depth;
    row_max = out + rows * dim;
    row_sum = row_max + padded;
    const int64_t tiles = std::min(plan.num_members, kSharedTiles);
    shared =
        reinterpret_cast<int32_t*>(scores + rows * (block + block / 2) +
                                   tiles * (rows * (plan.depth + dim) + 2 * padded));
  }

  float* scores = nullptr;
  uint32_t* pairs = nullptr;
  uint32_t* query = nullptr;
  float* out = nullptr;
  float* row_max = nullptr;
  float* row_sum = nullptr;
  // Behind the tiles: positions of the means of blocks, then the memory of RowKeys.
  int32_t* shared = nullptr;
};

struct QueryTile {
  int32_t head = 0;
  int32_t query_block = 0;  // of the sequence's query blocks
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t first_position = 0;
};

// The same rows of up to kSharedTiles query heads.
struct TileGroup {
  QueryTile first;
  int32_t size = 0;

  QueryTile At(int32_t slot) const {
    QueryTile tile = first;
    tile.head += slot;
    return tile;
  }
};

// Later query blocks have longer lists: they come first.
TileGroup GroupAt(const AttentionRun& run, const Unit& unit, int64_t index) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const int64_t per_block = int64_t{plan.tile_groups} * plan.tiles_per_block;
  const auto block = static_cast<int32_t>(s.num_query_blocks - 1 - index / per_block);
  const auto rest = static_cast<int32_t>(index % per_block);
  const int32_t member = rest / plan.tiles_per_block * kSharedTiles;
  const int32_t begin = (s.first_query_block + block) * plan.geometry.block_size +
                        rest % plan.tiles_per_block * plan.query_tile;
  const int32_t first = std::max(begin, s.query_offset);
  const int32_t end = std::min(begin + plan.query_tile, s.k_len);
  return {.first = {.head = run.QueryHead(unit, member),
                    .query_block = block,
                    .first_row = first - s.query_offset,
                    .rows = std::max(end - first, 0),
                    .first_position = first},
          .size = std::min(kSharedTiles, plan.num_members - member)};
}

// A tile's list, walked from its end.
class ListWalk {
 public:
  ListWalk() = default;
  ListWalk(const AttentionRun& run, const Unit& unit, const QueryTile& tile) {
    if (!unit.sparse || run.RanDense(unit) != 0) {
      left_ = run.Sequence(unit).first_query_block + tile.query_block + 1;
      return;
    }
    list_ = run.List(unit, tile.head, tile.query_block);
    left_ = static_cast<int32_t>(list_.size());
  }

  // The whole list; empty where it is not stored.
  std::span<const uint16_t> list() const { return list_; }
  // -1 at the end.
  int32_t block() const {
    return left_ == 0 || list_.data() == nullptr ? left_ - 1 : list_[left_ - 1];
  }
  void Advance() { --left_; }

 private:
  std::span<const uint16_t> list_;  // null: every block below left_
  int32_t left_ = 0;
};

void LoadQueries(const AttentionRun& run, const Unit& unit, const QueryTile& tile,
                 const TileScratch& scratch) {
  const CpuAttentionPlan& plan = run.plan;
  for (int32_t r = 0; r < tile.rows; ++r) {
    RowToWords(
        run.kernels, plan.format, run.QueryRow(unit, tile.head, tile.first_row + r),
        plan.geometry.head_dim, scratch.query + static_cast<int64_t>(r) * plan.depth);
  }
  std::fill_n(scratch.out, static_cast<int64_t>(tile.rows) * plan.geometry.head_dim,
              0.0f);
  std::fill_n(scratch.row_max, tile.rows, -INFINITY);
  std::fill_n(scratch.row_sum, tile.rows, 0.0f);
}

// One block of keys and values, or of their means.
struct KeyBlock {
  const uint32_t* keys = nullptr;
  const uint32_t* values = nullptr;
  const int32_t* positions = nullptr;  // null: every row sees every key
  float bias = 0;                      // added to the dot products
};

void AttendKeys(const AttentionRun& run, const QueryTile& tile, const KeyBlock& block,
                const TileScratch& scratch) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const GemmFunction gemm =
      plan.format.pairs ? run.kernels.gemm_pairs : run.kernels.gemm;
  gemm({.rows = tile.rows,
        .cols = g.block_size,
        .depth = plan.depth,
        .a = scratch.query,
        .a_stride = plan.depth,
        .b = block.keys,
        .c = scratch.scores,
        .c_stride = g.block_size});
  if (block.bias != 0) {
    const int64_t scores = int64_t{tile.rows} * g.block_size;
    for (int64_t i = 0; i < scores; ++i) scratch.scores[i] += block.bias;
  }
  run.kernels.softmax({.rows = tile.rows,
                       .cols = g.block_size,
                       .head_dim = g.head_dim,
                       .scale = kLog2E / std::sqrt(static_cast<float>(g.head_dim)),
                       .positions = block.positions,
                       .first_query = tile.first_position,
                       .scores = scratch.scores,
                       .pairs = plan.format.pairs ? scratch.pairs : nullptr,
                       .row_max = scratch.row_max,
                       .row_sum = scratch.row_sum,
                       .out = scratch.out});
  const int32_t depth = plan.format.pairs ? g.block_size / 2 : g.block_size;
  gemm({.rows = tile.rows,
        .cols = g.head_dim,
        .depth = depth,
        .a = plan.format.pairs ? scratch.pairs
                               : reinterpret_cast<const uint32_t*>(scratch.scores),
        .a_stride = depth,
        .b = block.values,
        .c = scratch.out,
        .c_stride = g.head_dim,
        .accumulate = true});
}

void AttendBlock(const AttentionRun& run, const Unit& unit, const QueryTile& tile,
                 int32_t block, const RowKeys* keys, const TileScratch& scratch) {
  const int64_t block_size = run.plan.geometry.block_size;
  const int32_t* range = run.BlockRange(unit) + 2 * static_cast<int64_t>(block);
  if (range[0] > tile.first_position + tile.rows - 1) return;  // wholly later
  const bool has_padding = (block + 1) * block_size > run.Sequence(unit).k_len;
  const bool masked = has_padding || range[1] > tile.first_position;
  const int32_t* positions =
      masked ? run.Positions(unit) + block * block_size : nullptr;
  if (keys != nullptr && !keys->HoldsBlock(block)) {
    positions = keys->BlockPositions(block);
  }
  AttendKeys(run, tile,
             {.keys = run.PackedKeys(unit) + block * run.BlockWords(),
              .values = run.PackedValues(unit) + block * run.BlockWords(),
              .positions = positions},
             scratch);
}

// Attends to the means of the blocks that are not in `list` and that lie wholly before
// the query block, one key each, with the weight of a whole block.
void AttendMeans(const AttentionRun& run, const Unit& unit, const QueryTile& tile,
                 std::span<const uint16_t> list, const RowKeys* keys,
                 const TileScratch& scratch) {
  const AttentionGeometry& g = run.plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t* range = run.BlockRange(unit);
  const int32_t first_query =
      std::max((s.first_query_block + tile.query_block) * g.block_size, s.query_offset);
  const int32_t mean_blocks = run.plan.MeanBlocks(s);
  int32_t* visible = scratch.shared;
  std::fill_n(visible, int64_t{mean_blocks} * g.block_size, INT32_MAX);
  for (int32_t j = 0; j < s.num_key_blocks; ++j) {
    if (range[2 * j + 1] < first_query) visible[j] = 0;
  }
  for (const uint16_t block : list) visible[block] = INT32_MAX;
  if (keys != nullptr) {  // a block of which a column is read
    for (const int32_t column : keys->columns()) {
      if (keys->ReadsColumn(column)) visible[column / g.block_size] = INT32_MAX;
    }
  }
  const float bias = std::log(static_cast<float>(g.block_size)) *
                     std::sqrt(static_cast<float>(g.head_dim));
  for (int32_t i = 0; i < mean_blocks; ++i) {
    const int32_t* positions = visible + int64_t{i} * g.block_size;
    if (std::find(positions, positions + g.block_size, 0) == positions + g.block_size) {
      continue;
    }
    AttendKeys(run, tile,
               {.keys = run.MeanKeys(unit) + i * run.BlockWords(),
                .values = run.MeanValues(unit) + i * run.BlockWords(),
                .positions = positions,
                .bias = bias},
               scratch);
  }
}

void StoreRows(AttentionRun& run, const Unit& unit, const QueryTile& tile,
               const TileScratch& scratch) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const AttentionTensors& tensors = run.tensors;
  const bool passes_on = plan.problem.options.method == Method::kDense;
  for (int32_t r = 0; r < tile.rows; ++r) {
    float* out = scratch.out + static_cast<int64_t>(r) * g.head_dim;
    const float sum = scratch.row_sum[r];
    // Every row sees its own key, so a sum of 0 is an overflow too.
    if (!passes_on && !(sum > 0 && sum < INFINITY)) run.non_finite = true;
    run.kernels.divide(sum > 0 ? sum : 1.0f, out, g.head_dim);  // no key seen: 0
    const int32_t row = tile.first_row + r;
    auto* target = static_cast<std::byte*>(tensors.o.data) +
                   tensors.o.layout.Offset(unit.sequence, s.q_begin, tile.head, row) *
                       DTypeBytes(plan.problem.dtype);
    RowFromF32(run.kernels, plan.problem.dtype, out, g.head_dim, target);
    if (tensors.lse.data != nullptr) {
      static_cast<float*>(tensors.lse.data)[tensors.lse.layout.Offset(
          unit.sequence, s.q_begin, tile.head, row)] =
          scratch.row_max[r] * kLn2 + std::log(sum);
    }
  }
}

// Attends to the chosen columns that the tile's spans do not hold.
void AttendColumns(const AttentionRun& run, const Unit& unit, const QueryTile& tile,
                   const RowKeys& keys, const TileScratch& scratch) {
  const int32_t member = tile.head - run.QueryHead(unit, 0);
  const int32_t blocks = run.plan.GatheredBlocks(run.Sequence(unit));
  for (int32_t i = 0; i < blocks; ++i) {
    const int32_t* positions = keys.ColumnPositions(i);
    if (positions == nullptr) continue;
    AttendKeys(run, tile,
               {.keys = run.GatheredKeys(unit, member) + i * run.BlockWords(),
                .values = run.GatheredValues(unit, member) + i * run.BlockWords(),
                .positions = positions},
               scratch);
  }
}

// One tile on its way through its list.
struct TileWalk {
  TileWalk() = default;
  TileWalk(const AttentionRun& run, const Unit& unit, const QueryTile& query_tile,
           int worker, int32_t slot)
      : tile(query_tile), scratch(run, worker, slot), list(run, unit, tile) {
    LoadQueries(run, unit, tile, scratch);
    if (!run.plan.gathers || list.list().empty()) return;
    const SequenceGeometry& s = run.Sequence(unit);
    const int64_t block_size = run.plan.geometry.block_size;
    int32_t* mask =
        scratch.shared + (run.plan.corrects ? run.plan.MeanBlocks(s) * block_size : 0);
    auto* spans =
        reinterpret_cast<uint32_t*>(mask + block_size) + slot * RowKeys::SlotWords(s);
    row_keys.emplace(run, unit, tile.head, tile.first_position, spans, mask);
  }

  const RowKeys* keys() const { return row_keys.has_value() ? &*row_keys : nullptr; }

  QueryTile tile;
  TileScratch scratch;
  ListWalk list;
  std::optional<RowKeys> row_keys;  // where the tile reads parts of blocks
};

void AttendTiles(AttentionRun& run, const Unit& unit, int64_t index, int worker) {
  const TileGroup group = GroupAt(run, unit, index);
  if (group.first.rows == 0 || run.Stopped()) return;
  std::array<TileWalk, kSharedTiles> slots;
  const std::span<TileWalk> walks(slots.data(), static_cast<size_t>(group.size));
  for (int32_t slot = 0; slot < group.size; ++slot) {
    slots[slot] = TileWalk(run, unit, group.At(slot), worker, slot);
  }
  for (;;) {
    int32_t block = -1;
    for (const TileWalk& walk : walks) block = std::max(block, walk.list.block());
    if (block < 0) break;
    for (TileWalk& walk : walks) {
      if (walk.list.block() != block) continue;
      AttendBlock(run, unit, walk.tile, block, walk.keys(), walk.scratch);
      walk.list.Advance();
    }
  }
  for (const TileWalk& walk : walks) {
    if (walk.keys() != nullptr) {
      AttendColumns(run, unit, walk.tile, *walk.keys(), walk.scratch);
    }
    if (run.plan.corrects && !walk.list.list().empty()) {
      AttendMeans(run, unit, walk.tile, walk.list.list(), walk.keys(), walk.scratch);
    }
    StoreRows(run, unit, walk.tile, walk.scratch);
  }
}

}  // namespace

void Attend(AttentionRun& run, const Wave& wave) {
  run.ForEach(wave, wave.query_tiles, [&](const Unit& unit, int64_t index, int worker) {
    AttendTiles(run, unit, index, worker);
  });
}

}  // namespace pbs::cpu
