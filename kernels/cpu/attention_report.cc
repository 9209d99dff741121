// The report of a finished run: block counts, densities, coverage, order, lists.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/list_report.h"
#include "cpu/attention_run.h"

namespace pbs::cpu {
namespace {

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

  void Coverage(AttentionReport* report) const {
    const int64_t per_head = plan_.sampled_before.back();
    report->stats.coverage_rows = g_.num_heads * per_head;
    if (per_head == 0) return;
    const double* rows = At<double>(plan_.coverage_at);
    double sum = 0;
    for (int32_t head = 0; head < g_.num_heads; ++head, rows += per_head) {
      const double of_head = std::accumulate(rows, rows + per_head, 0.0);
      report->heads.coverage.push_back(of_head / static_cast<double>(per_head));
      sum += of_head;
    }
    report->stats.coverage = sum / static_cast<double>(report->stats.coverage_rows);
  }

  std::vector<int32_t> GuardedHeads() const {
    std::vector<int32_t> heads;
    if (plan_.problem.options.coverage_min <= 0) return heads;
    const auto* guarded = At<uint8_t>(plan_.guarded_at);
    for (int32_t head = 0; head < g_.num_heads; ++head) {
      for (size_t n = 0; n < g_.sequences.size(); ++n) {
        if (guarded[n * static_cast<size_t>(g_.num_heads) + head] == 0) continue;
        heads.push_back(head);
        break;
      }
    }
    return heads;
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
  reader.Coverage(report);
  report->heads.guarded = reader.GuardedHeads();
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
