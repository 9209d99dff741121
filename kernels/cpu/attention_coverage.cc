// The attention mass that the selected blocks keep, measured exactly on sampled rows,
// and the guard that reads every block where it is too small.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "cpu/attention_run.h"
#include "cpu/row_keys.h"

namespace pbs::cpu {
namespace {

// Share of one row's exact softmax mass inside its selected blocks.
double RowCoverage(const AttentionRun& run, const Unit& unit, int32_t head, int32_t row,
                   int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  auto* query = static_cast<uint32_t*>(run.Scratch(worker));
  auto* logits = reinterpret_cast<float*>(query + plan.depth);
  RowToWords(run.kernels, plan.format, run.QueryRow(unit, head, row), g.head_dim,
             query);
  const GemmFunction gemm =
      plan.format.pairs ? run.kernels.gemm_pairs : run.kernels.gemm;
  const int32_t position = s.query_offset + row;
  const int32_t* positions = run.Positions(unit);
  const float root = std::sqrt(static_cast<float>(g.head_dim));
  const int64_t slots = static_cast<int64_t>(s.num_key_blocks) * g.block_size;
  for (int32_t block = 0; block < s.num_key_blocks; ++block) {
    gemm({.rows = 1,
          .cols = g.block_size,
          .depth = plan.depth,
          .a = query,
          .a_stride = plan.depth,
          .b = run.PackedKeys(unit) + block * run.BlockWords(),
          .c = logits + static_cast<int64_t>(block) * g.block_size,
          .c_stride = g.block_size});
  }
  float top = -INFINITY;
  for (int64_t slot = 0; slot < slots; ++slot) {
    logits[slot] = positions[slot] <= position ? logits[slot] / root : -INFINITY;
    top = std::max(top, logits[slot]);
  }
  const auto mass_of = [&](int32_t block) {
    double mass = 0;
    const float* at = logits + static_cast<int64_t>(block) * g.block_size;
    for (int32_t i = 0; i < g.block_size; ++i) mass += std::exp(at[i] - top);
    return mass;
  };
  double total = 0;
  for (int32_t block = 0; block < s.num_key_blocks; ++block) total += mass_of(block);
  double selected = 0;
  if (plan.gathers) {
    const RowKeys keys(run, unit, head, position,
                       reinterpret_cast<uint32_t*>(logits + slots), nullptr);
    for (int32_t slot = 0; slot < s.k_len; ++slot) {
      if (keys.Reads(slot)) selected += std::exp(logits[slot] - top);
    }
    return selected / total;
  }
  const int32_t query_block = position / g.block_size - s.first_query_block;
  for (uint16_t block : run.List(unit, head, query_block)) selected += mass_of(block);
  return selected / total;
}

int32_t SampledRows(const AttentionRun& run, const Unit& unit) {
  return std::min(run.plan.problem.options.coverage_rows, run.Sequence(unit).q_len);
}

// Coverage of the sampled rows of a query head, [SampledRows()].
double* CoverageOf(const AttentionRun& run, const Unit& unit, int32_t head) {
  const CpuAttentionPlan& plan = run.plan;
  return run.At<double>(plan.coverage_at) + head * plan.sampled_before.back() +
         plan.sampled_before[unit.sequence];
}

void MeasureUnit(AttentionRun& run, const Unit& unit) {
  const int32_t rows = SampledRows(run, unit);
  const int32_t q_len = run.Sequence(unit).q_len;
  const bool dense = !unit.sparse || run.RanDense(unit) != 0;
  run.pool.ParallelFor(
      static_cast<int64_t>(rows) * run.plan.num_members,
      [&](int64_t index, int worker) {
        if (run.Stopped()) return;
        const int32_t head = run.QueryHead(unit, static_cast<int32_t>(index / rows));
        const auto sample = static_cast<int32_t>(index % rows);
        CoverageOf(run, unit, head)[sample] =
            dense ? 1.0
                  : RowCoverage(run, unit, head, CoverageRow(sample, rows, q_len),
                                worker);
      });
}

// Lists every block up to the end of each row's own segment.
void ListEveryBlock(AttentionRun& run, const Unit& unit, int32_t head) {
  const SequenceGeometry& s = run.Sequence(unit);
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    const int32_t count = run.plan.geometry.RowCapacity(s, s.first_query_block + i);
    uint16_t* list = run.ListEntries(unit, head, i);
    std::iota(list, list + count, uint16_t{0});
    run.ListCount(unit, head, i) = static_cast<uint16_t>(count);
  }
}

}  // namespace

void GuardCoverage(AttentionRun& run, const Wave& wave) {
  const CpuAttentionPlan& plan = run.plan;
  const double least = plan.problem.options.coverage_min;
  if (least <= 0) return;
  for (int32_t i = 0; i < wave.num_units && !run.Stopped(); ++i) {
    const Unit& unit = plan.units[wave.first_unit + i];
    if (!plan.SelectsBlocks(unit)) continue;
    MeasureUnit(run, unit);
    const int32_t rows = SampledRows(run, unit);
    for (int32_t member = 0; member < plan.num_members; ++member) {
      const int32_t head = run.QueryHead(unit, member);
      const double* coverage = CoverageOf(run, unit, head);
      const bool keeps_enough =
          std::accumulate(coverage, coverage + rows, 0.0) >= least * rows;
      run.Guarded(unit, head) = keeps_enough ? 0 : 1;
      if (!keeps_enough) ListEveryBlock(run, unit, head);
    }
  }
}

void MeasureCoverage(AttentionRun& run, const Wave& wave) {
  if (run.plan.problem.options.coverage_rows == 0) return;
  for (int32_t i = 0; i < wave.num_units && !run.Stopped(); ++i) {
    MeasureUnit(run, run.plan.units[wave.first_unit + i]);
  }
}

}  // namespace pbs::cpu
