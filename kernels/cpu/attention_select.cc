// Stage 2: block means of queries, block scores, lists.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "common/score_rounding.h"
#include "cpu/attention_run.h"
#include "methods/block_selection.h"

namespace pbs::cpu {
namespace {

float* PooledQueries(const AttentionRun& run, const Unit& unit, int32_t member) {
  const SequenceGeometry& s = run.Sequence(unit);
  return run.Pooled(unit) + run.plan.Pooled(s).queries +
         static_cast<int64_t>(member) * s.num_query_blocks * run.plan.geometry.head_dim;
}

void PoolQueryBlock(AttentionRun& run, const Unit& unit, int32_t member,
                    int32_t query_block, int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t position = (s.first_query_block + query_block) * g.block_size;
  const int32_t first = std::max(position - s.query_offset, 0);
  const int32_t last = std::min(position + g.block_size - s.query_offset, s.q_len);
  auto* rows = static_cast<uint32_t*>(run.Scratch(worker));
  for (int32_t row = first; row < last; ++row) {
    RowToWords(run.kernels, plan.format,
               run.QueryRow(unit, run.QueryHead(unit, member), row), g.head_dim,
               rows + static_cast<int64_t>(row - first) * plan.depth);
  }
  MeanOfRows(run, rows, last - first,
             PooledQueries(run, unit, member) +
                 static_cast<int64_t>(query_block) * g.head_dim);
}

// Raw dot products of block means -> scaled logits.
void ScaleLogits(const AttentionRun& run, std::span<float> logits) {
  const float root = std::sqrt(static_cast<float>(run.plan.geometry.head_dim));
  const DType rounding = ScoreRoundingOf(run.plan.problem);
  VisitDType(rounding, [&](auto element) {
    using Element = decltype(element);
    const auto round = [](float x) { return ToFloat(FromFloat<Element>(x)); };
    for (float& logit : logits) logit = round(round(logit) / root);
  });
}

SelectionRow RowRule(const AttentionRun& run, const Unit& unit, int32_t block) {
  const AttentionGeometry& g = run.plan.geometry;
  const AttentionOptions& options = run.plan.problem.options;
  const int32_t own = block / g.blocks_per_segment * g.blocks_per_segment;
  return {
      .num_candidates = options.method == Method::kMeanPooling ? block + 1 : own,
      .own_begin = own,
      .own_end = g.RowCapacity(run.Sequence(unit), block),
      .forced_block = options.force_first_block ? run.FirstBlock(unit) : -1,
      .threshold = options.threshold,
  };
}

void ScoreTileOfBlocks(AttentionRun& run, const Unit& unit, int64_t index, int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int64_t tiles = (s.num_query_blocks + kScoreTile - 1) / kScoreTile;
  const auto member = static_cast<int32_t>(index / tiles);
  const auto first = static_cast<int32_t>(index % tiles * kScoreTile);
  const int32_t rows = std::min(kScoreTile, s.num_query_blocks - first);
  const auto padded = static_cast<int32_t>(RoundUp(s.num_key_blocks, kLanePad));
  auto* logits = static_cast<float*>(run.Scratch(worker));
  auto* keys =
      reinterpret_cast<uint64_t*>(logits + static_cast<int64_t>(padded) * kScoreTile);
  const float* queries =
      PooledQueries(run, unit, member) + static_cast<int64_t>(first) * g.head_dim;
  run.kernels.gemm(
      {.rows = rows,
       .cols = padded,
       .depth = g.head_dim,
       .a = reinterpret_cast<const uint32_t*>(queries),
       .a_stride = g.head_dim,
       .b = reinterpret_cast<const uint32_t*>(run.Pooled(unit) + plan.Pooled(s).keys),
       .c = logits,
       .c_stride = padded});
  const int32_t head = run.QueryHead(unit, member);
  for (int32_t i = 0; i < rows; ++i) {
    const SelectionRow rule = RowRule(run, unit, s.first_query_block + first + i);
    const std::span<float> row(logits + static_cast<int64_t>(i) * padded,
                               static_cast<size_t>(rule.num_candidates));
    ScaleLogits(run, row);
    const auto selected =
        SelectRow(rule, row, {keys, static_cast<size_t>(s.num_key_blocks)},
                  run.ListEntries(unit, head, first + i));
    if (!selected.has_value()) {
      run.non_finite = true;
      return;
    }
    run.ListCount(unit, head, first + i) = static_cast<uint16_t>(selected->count);
  }
}

void FindFirstBlock(AttentionRun& run, const Unit& unit) {
  const int32_t* positions = run.Positions(unit);
  const int32_t* zero = std::find(positions, positions + run.Sequence(unit).k_len, 0);
  run.FirstBlock(unit) =
      static_cast<int32_t>(zero - positions) / run.plan.geometry.block_size;
}

void ClearPooledPadding(const AttentionRun& run, const Unit& unit) {
  const AttentionGeometry& g = run.plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const float zeros[kHeadDims.back()] = {};
  const auto padded = static_cast<int32_t>(RoundUp(s.num_key_blocks, kLanePad));
  for (int32_t block = s.num_key_blocks; block < padded; ++block) {
    StoreColumn(run.kernels, padded, block, g.head_dim, zeros,
                run.Pooled(unit) + run.plan.Pooled(s).keys);
  }
}

}  // namespace

double UnitCausalRatio(const AttentionRun& run, const Unit& unit) {
  const SequenceGeometry& s = run.Sequence(unit);
  int64_t executed = 0;
  int64_t causal = 0;
  for (int32_t member = 0; member < run.plan.num_members; ++member) {
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      executed += run.ListCount(unit, run.QueryHead(unit, member), i);
      causal += s.first_query_block + i + 1;
    }
  }
  return static_cast<double>(executed) / static_cast<double>(causal);
}

void SelectBlocks(AttentionRun& run, const Wave& wave) {
  if (wave.query_blocks.back() == 0) return;
  run.pool.ParallelFor(wave.num_units, [&](int64_t i, int) {
    const Unit& unit = run.plan.units[wave.first_unit + i];
    if (!run.plan.SelectsBlocks(unit)) return;
    FindFirstBlock(run, unit);
    ClearPooledPadding(run, unit);
  });
  run.ForEach(wave, wave.query_blocks,
              [&](const Unit& unit, int64_t index, int worker) {
                const int32_t blocks = run.Sequence(unit).num_query_blocks;
                PoolQueryBlock(run, unit, static_cast<int32_t>(index / blocks),
                               static_cast<int32_t>(index % blocks), worker);
              });
  run.ForEach(wave, wave.score_tiles, [&](const Unit& unit, int64_t index, int worker) {
    ScoreTileOfBlocks(run, unit, index, worker);
  });
}

}  // namespace pbs::cpu
