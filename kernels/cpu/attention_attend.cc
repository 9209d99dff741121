// Stage 3: attention of one query tile over its block list.
#include <algorithm>
#include <cmath>

#include "cpu/attention_run.h"

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// A worker's state of one query tile.
struct TileScratch {
  TileScratch(const AttentionRun& run, int worker) {
    const CpuAttentionPlan& plan = run.plan;
    const int64_t rows = plan.query_tile;
    auto* at = static_cast<float*>(run.Scratch(worker));
    const auto take = [&at](int64_t count) {
      float* taken = at;
      at += count;
      return taken;
    };
    query = reinterpret_cast<uint32_t*>(take(rows * plan.depth));
    scores = take(rows * plan.geometry.block_size);
    pairs = reinterpret_cast<uint32_t*>(take(rows * plan.geometry.block_size / 2));
    out = take(rows * plan.geometry.head_dim);
    row_max = take(RoundUp(rows, kLanePad));
    row_sum = take(RoundUp(rows, kLanePad));
  }

  uint32_t* query;
  float* scores;
  uint32_t* pairs;
  float* out;
  float* row_max;
  float* row_sum;
};

struct QueryTile {
  int32_t head = 0;
  int32_t query_block = 0;  // of the sequence's query blocks
  int32_t first_row = 0;
  int32_t rows = 0;
  int32_t first_position = 0;
};

// Later query blocks have longer lists: they come first.
QueryTile TileAt(const AttentionRun& run, const Unit& unit, int64_t index) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const int64_t per_block =
      static_cast<int64_t>(plan.num_members) * plan.tiles_per_block;
  const auto block = static_cast<int32_t>(s.num_query_blocks - 1 - index / per_block);
  const auto rest = static_cast<int32_t>(index % per_block);
  const int32_t begin = (s.first_query_block + block) * plan.geometry.block_size +
                        rest % plan.tiles_per_block * plan.query_tile;
  const int32_t first = std::max(begin, s.query_offset);
  const int32_t end = std::min(begin + plan.query_tile, s.k_len);
  return {.head = run.QueryHead(unit, rest / plan.tiles_per_block),
          .query_block = block,
          .first_row = first - s.query_offset,
          .rows = std::max(end - first, 0),
          .first_position = first};
}

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

void AttendBlock(const AttentionRun& run, const Unit& unit, const QueryTile& tile,
                 int32_t block, const TileScratch& scratch) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const int32_t* range = run.BlockRange(unit) + 2 * static_cast<int64_t>(block);
  if (range[0] > tile.first_position + tile.rows - 1) return;  // wholly later
  const GemmFunction gemm =
      plan.format.pairs ? run.kernels.gemm_pairs : run.kernels.gemm;
  const uint32_t* values = run.PackedValues(unit) + block * run.BlockWords();
  gemm({.rows = tile.rows,
        .cols = g.block_size,
        .depth = plan.depth,
        .a = scratch.query,
        .a_stride = plan.depth,
        .b = run.PackedKeys(unit) + block * run.BlockWords(),
        .c = scratch.scores,
        .c_stride = g.block_size});
  const bool short_block =
      (block + 1) * g.block_size > run.Sequence(unit).k_len;  // has padding
  const bool masked = short_block || range[1] > tile.first_position;
  run.kernels.softmax(
      {.rows = tile.rows,
       .cols = g.block_size,
       .head_dim = g.head_dim,
       .scale = kLog2E / std::sqrt(static_cast<float>(g.head_dim)),
       .positions =
           masked ? run.Positions(unit) + static_cast<int64_t>(block) * g.block_size
                  : nullptr,
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
        .b = values,
        .c = scratch.out,
        .c_stride = g.head_dim,
        .accumulate = true});
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

void AttendTile(AttentionRun& run, const Unit& unit, int64_t index, int worker) {
  const QueryTile tile = TileAt(run, unit, index);
  if (tile.rows == 0 || run.Stopped()) return;
  const TileScratch scratch(run, worker);
  LoadQueries(run, unit, tile, scratch);
  if (!unit.sparse || run.RanDense(unit) != 0) {
    const int32_t own = run.Sequence(unit).first_query_block + tile.query_block;
    for (int32_t block = own; block >= 0; --block) {
      AttendBlock(run, unit, tile, block, scratch);
    }
  } else {
    const auto list = run.List(unit, tile.head, tile.query_block);
    for (auto block = list.rbegin(); block != list.rend(); ++block) {
      AttendBlock(run, unit, tile, *block, scratch);
    }
  }
  StoreRows(run, unit, tile, scratch);
}

}  // namespace

void Attend(AttentionRun& run, const Wave& wave) {
  run.ForEach(wave, wave.query_tiles, [&](const Unit& unit, int64_t index, int worker) {
    AttendTile(run, unit, index, worker);
  });
}

}  // namespace pbs::cpu
