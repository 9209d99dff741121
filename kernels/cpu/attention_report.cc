// The report of a finished run: block counts, densities, coverage, order, lists.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/list_report.h"
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

class ReportReader {
 public:
  ReportReader(const CpuAttentionPlan& plan, const std::byte* workspace)
      : plan_(plan), g_(plan.geometry), workspace_(workspace) {
    for (const Unit& unit : plan.units) {
      unit_of_.resize(g_.sequences.size() * g_.num_order_heads, -1);
      unit_of_[unit.sequence * g_.num_order_heads + unit.order_head] =
          static_cast<int32_t>(&unit - plan.units.data());
    }
  }

  template <class T>
  const T* At(int64_t offset) const {
    return reinterpret_cast<const T*>(workspace_ + offset);
  }

  bool RanDense(int32_t sequence, int32_t order_head) const {
    const int32_t unit = UnitOf(sequence, order_head);
    return !plan_.units[unit].sparse || At<uint8_t>(plan_.unit_dense_at)[unit] != 0;
  }

  RanRow Row(int32_t sequence, int32_t head, int32_t query_block) const {
    const SequenceGeometry& s = g_.sequences[sequence];
    if (RanDense(sequence, g_.OrderHead(head))) {
      return {.entries = nullptr, .count = s.first_query_block + query_block + 1};
    }
    return {
        .entries = At<uint16_t>(plan_.entries_at) + s.entries_begin +
                   head * s.entries_per_head +
                   plan_.row_entries[s.query_block_begin + query_block],
        .count = At<uint16_t>(plan_.counts_at)[g_.ListRow(sequence, head, query_block)],
        .gathered = plan_.gathers ? plan_.GatheredBlocks(s) : 0};
  }

  // Of all sequences and query heads; none when no method chose lines.
  std::vector<ChosenLines> Lines() const {
    std::vector<ChosenLines> lines;
    if (!plan_.gathers) return lines;
    lines.resize(g_.sequences.size() * static_cast<size_t>(g_.num_heads));
    for (const Unit& unit : plan_.units) {
      if (RanDense(unit.sequence, unit.order_head)) continue;
      const SequenceGeometry& s = g_.sequences[unit.sequence];
      for (int32_t member = 0; member < plan_.num_members; ++member) {
        const int32_t head = unit.order_head * plan_.num_members + member;
        const auto* begin = At<int32_t>(plan_.lines_at);
        const int32_t* columns = begin + plan_.ColumnsAt(unit, member);
        const int32_t* distances = begin + plan_.DistancesAt(unit, member);
        ChosenLines& chosen = lines[unit.sequence * g_.num_heads + head];
        chosen.columns.assign(columns, columns + plan_.Columns(s));
        chosen.distances.assign(distances, distances + plan_.Distances(s));
        std::reverse(chosen.distances.begin(), chosen.distances.end());
      }
    }
    return lines;
  }

  void WhatRan(AttentionStats& stats) const {
    bool all_dense = true;
    for (size_t i = 0; i < plan_.units.size(); ++i) {
      const bool fell_back = At<uint8_t>(plan_.unit_dense_at)[i] != 0;
      stats.dense_fallback |= fell_back;
      all_dense &= !plan_.units[i].sparse || fell_back;
    }
    stats.method_run = all_dense ? Method::kDense : plan_.problem.options.method;
  }

  void Coverage(AttentionStats& stats) const {
    stats.coverage_rows = g_.num_heads * plan_.sampled_before.back();
    const double* rows = At<double>(plan_.coverage_at);
    const double sum = std::accumulate(rows, rows + stats.coverage_rows, 0.0);
    stats.coverage =
        stats.coverage_rows == 0 ? 0.0 : sum / static_cast<double>(stats.coverage_rows);
  }

  std::vector<int32_t> Order() const {
    std::vector<int32_t> order(static_cast<size_t>(g_.num_order_heads * g_.total_k));
    for (int32_t head = 0; head < g_.num_order_heads; ++head) {
      for (const SequenceGeometry& s : g_.sequences) {
        auto out = order.begin() + head * g_.total_k + s.k_begin;
        if (s.q_len == 0) {
          std::iota(out, out + s.k_len, 0);
        } else {
          std::copy_n(
              At<int32_t>(plan_.positions_at) + head * g_.total_slots + s.slot_begin,
              s.k_len, out);
        }
      }
    }
    return order;
  }

 private:
  int32_t UnitOf(int32_t sequence, int32_t order_head) const {
    return unit_of_[sequence * g_.num_order_heads + order_head];
  }

  const CpuAttentionPlan& plan_;
  const AttentionGeometry& g_;
  const std::byte* workspace_;
  std::vector<int32_t> unit_of_;
};

}  // namespace

void MeasureCoverage(AttentionRun& run, const Wave& wave) {
  const CpuAttentionPlan& plan = run.plan;
  if (plan.problem.options.coverage_rows == 0) return;
  const int64_t per_head = plan.sampled_before.back();
  for (int32_t i = 0; i < wave.num_units && !run.Stopped(); ++i) {
    const Unit& unit = plan.units[wave.first_unit + i];
    const SequenceGeometry& s = run.Sequence(unit);
    const int32_t rows = std::min(plan.problem.options.coverage_rows, s.q_len);
    const bool dense = !unit.sparse || run.RanDense(unit) != 0;
    double* out = run.At<double>(plan.coverage_at) + plan.sampled_before[unit.sequence];
    run.pool.ParallelFor(
        static_cast<int64_t>(rows) * plan.num_members, [&](int64_t index, int worker) {
          if (run.Stopped()) return;
          const int32_t head = run.QueryHead(unit, static_cast<int32_t>(index / rows));
          const auto sample = static_cast<int32_t>(index % rows);
          out[head * per_head + sample] =
              dense ? 1.0
                    : RowCoverage(run, unit, head, CoverageRow(sample, rows, s.q_len),
                                  worker);
        });
  }
}

void FillReport(const CpuAttentionPlan& plan, const std::byte* workspace,
                const ReportRequest& request, AttentionReport* report) {
  *report = {};
  const ReportReader reader(plan, workspace);
  const auto row_of = [&](int32_t sequence, int32_t head, int32_t query_block) {
    return reader.Row(sequence, head, query_block);
  };
  const auto ran_dense = [&](int32_t sequence, int32_t order_head) {
    return reader.RanDense(sequence, order_head);
  };
  TellBlocks(plan.geometry, CountBlocks(plan.geometry, row_of), ran_dense, report);
  reader.WhatRan(report->stats);
  reader.Coverage(report->stats);
  const double* times = reader.At<double>(plan.times_at);
  report->stats.permute_seconds = times[0];
  report->stats.select_seconds = times[1];
  report->stats.attend_seconds = times[2];
  if (request.order) report->order = reader.Order();
  if (request.lists) {
    report->lists = RanLists(plan.geometry, row_of);
    report->lines = reader.Lines();
  }
}

}  // namespace pbs::cpu
