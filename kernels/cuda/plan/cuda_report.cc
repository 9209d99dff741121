#include "cuda/plan/cuda_report.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/list_report.h"
#include "common/score_rounding.h"

namespace pbs::cuda {
namespace {

template <class T>
const T* At(const std::byte* workspace, int64_t offset) {
  return reinterpret_cast<const T*>(workspace + offset);
}

// Our own lists hold all of the own segment, so that what they hold is known from their
// lengths: megabytes of entries stay on the device.
bool ReadsEntries(const CudaAttentionPlan& plan, const ReportRequest& request) {
  return plan.has_lists && (request.lists || plan.problem.options.use_given_lists);
}

// Rows of the lists by ListRow(), from the tiles that ran.
std::vector<RanRow> RowsOf(const CudaAttentionPlan& plan, const std::byte* workspace,
                           bool reads_entries) {
  const AttentionGeometry& g = plan.geometry;
  const auto* tiles = At<AttentionTile>(workspace, plan.tiles_at);
  const auto* entries = At<uint16_t>(workspace, plan.entries_at);
  std::vector<RanRow> rows(static_cast<size_t>(plan.num_tiles()));
  for (size_t i = 0; i < rows.size(); ++i) {
    const AttentionTile& tile = tiles[i];
    const SequenceGeometry& s = g.sequences[tile.sequence];
    const int32_t block = tile.first_position / kTileRows;
    RanRow& row =
        rows[g.ListRow(tile.sequence, tile.head, block - s.first_query_block)];
    row.count = tile.list_count;
    if (tile.list_begin < 0) continue;
    if (reads_entries) {
      row.entries = entries + tile.list_begin;
    } else {
      row.lower = row.count - (g.RowCapacity(s, block) - block - 1);
    }
  }
  return rows;
}

void WhatRan(const CudaAttentionPlan& plan, const std::byte* workspace,
             AttentionStats& stats) {
  const bool may_fall_back = plan.problem.options.dense_fallback && plan.selects;
  const auto* fell_back = At<int32_t>(workspace, plan.fell_back_at);
  const auto num_sequences = static_cast<int32_t>(plan.sequences.size());
  bool all_dense = true;
  for (int32_t head = 0; head < plan.geometry.num_order_heads; ++head) {
    for (int32_t n = 0; n < num_sequences; ++n) {
      if (plan.sequences[n].sparse == 0) continue;
      const bool fell = may_fall_back && fell_back[head * num_sequences + n] != 0;
      stats.dense_fallback |= fell;
      all_dense &= fell;
    }
  }
  stats.method_run = all_dense ? Method::kDense : plan.problem.options.method;
}

std::vector<int32_t> OrderOf(const CudaAttentionPlan& plan,
                             const std::byte* workspace) {
  const AttentionGeometry& g = plan.geometry;
  const auto* positions = At<int32_t>(workspace, plan.positions_at);
  std::vector<int32_t> order(static_cast<size_t>(g.num_order_heads * g.total_k));
  for (int32_t head = 0; head < g.num_order_heads; ++head) {
    for (const SequenceGeometry& s : g.sequences) {
      const auto out = order.begin() + head * g.total_k + s.k_begin;
      if (plan.permutes) {
        std::copy_n(positions + head * g.total_slots + s.slot_begin, s.k_len, out);
      } else {
        std::iota(out, out + s.k_len, 0);
      }
    }
  }
  return order;
}

}  // namespace

std::vector<ReportRegion> ReportRegions(const CudaAttentionPlan& plan,
                                        const ReportRequest& request) {
  const AttentionGeometry& g = plan.geometry;
  std::vector<ReportRegion> regions = {
      {plan.flags_at, static_cast<int64_t>(sizeof(int32_t))},
      {plan.tiles_at, plan.num_tiles() * static_cast<int64_t>(sizeof(AttentionTile))},
      {plan.fell_back_at, static_cast<int64_t>(sizeof(int32_t)) * g.num_order_heads *
                              static_cast<int64_t>(plan.sequences.size())}};
  if (ReadsEntries(plan, request)) {
    regions.push_back({plan.entries_at, 2 * g.total_entries});
  }
  if (request.order && plan.permutes) {
    regions.push_back({plan.positions_at, plan.memory.order_bytes});
  }
  return regions;
}

Status FillCudaReport(const CudaAttentionPlan& plan, const std::byte* workspace,
                      const ReportRequest& request, AttentionReport* report) {
  *report = {};
  if (*At<int32_t>(workspace, plan.flags_at) != 0) {
    return ScoreOverflow(plan.problem);
  }
  const std::vector<RanRow> rows = RowsOf(plan, workspace, ReadsEntries(plan, request));
  const auto row_of = [&](int32_t sequence, int32_t head, int32_t query_block) {
    return rows[plan.geometry.ListRow(sequence, head, query_block)];
  };
  CountBlocks(plan.geometry, row_of, report);
  WhatRan(plan, workspace, report->stats);
  if (request.order) report->order = OrderOf(plan, workspace);
  if (request.lists) report->lists = RanLists(plan.geometry, row_of);
  return Status();
}

}  // namespace pbs::cuda
