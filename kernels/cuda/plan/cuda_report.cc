#include "cuda/plan/cuda_report.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "common/list_report.h"
#include "common/score_rounding.h"

namespace pbs::cuda {
namespace {

// Parts of the summary, by their offsets in the workspace.
class Summary {
 public:
  Summary(const CudaAttentionPlan& plan, const std::byte* data)
      : plan_(plan), data_(data) {}

  const RunSummary& head() const { return *At<RunSummary>(plan_.summary_at); }
  std::vector<BlockCounts> Blocks() const {
    if (!plan_.has_lists) return CausalBlocks(plan_.geometry);
    const auto* heads = At<BlockCounts>(plan_.head_blocks_at);
    return {heads, heads + plan_.geometry.num_heads};
  }
  bool FellBack(int32_t order_head, int32_t sequence) const {
    if (!plan_.may_fall_back()) return false;
    const auto num_sequences = static_cast<int64_t>(plan_.sequences.size());
    return At<int32_t>(plan_.fell_back_at)[order_head * num_sequences + sequence] != 0;
  }
  // Heads that are guarded in at least one sequence.
  std::vector<int32_t> GuardedHeads() const {
    std::vector<int32_t> heads;
    if (!plan_.guards()) return heads;
    const size_t num_sequences = plan_.sequences.size();
    const auto* guarded = At<int32_t>(plan_.guarded_at);
    for (int32_t head = 0; head < plan_.geometry.num_heads; ++head) {
      const auto* begin = guarded + head * num_sequences;
      const bool any = std::any_of(begin, begin + num_sequences,
                                   [](int32_t is_guarded) { return is_guarded != 0; });
      if (any) heads.push_back(head);
    }
    return heads;
  }
  // Of the sequence's i-th sampled row.
  double Coverage(int32_t head, const SequenceRecord& s, int32_t i) const {
    const int64_t begin = int64_t{head} * plan_.coverage_groups + s.coverage_begin;
    return At<float>(plan_.coverage_at)[begin * kCoverageRowsTogether + i];
  }

 private:
  template <class T>
  const T* At(int64_t offset) const {
    return reinterpret_cast<const T*>(data_ + (offset - plan_.summary_at));
  }

  const CudaAttentionPlan& plan_;
  const std::byte* data_;
};

// Rows of sequences that run dense see all of their mass.
void TellCoverage(const CudaAttentionPlan& plan, const Summary& summary,
                  AttentionReport* report) {
  AttentionStats& stats = report->stats;
  const int32_t num_heads = plan.geometry.num_heads;
  std::vector<double> heads(static_cast<size_t>(num_heads));
  int64_t rows_of_head = 0;
  for (const SequenceRecord& s : plan.sequences) {
    const int32_t rows = SampledRows(plan.problem.options.coverage_rows, s.q_len);
    rows_of_head += rows;
    for (int32_t head = 0; head < num_heads; ++head) {
      for (int32_t i = 0; i < rows; ++i) {
        heads[head] += s.sparse != 0 ? summary.Coverage(head, s, i) : 1.0;
      }
    }
  }
  stats.coverage_rows = num_heads * rows_of_head;
  const double sum = std::accumulate(heads.begin(), heads.end(), 0.0);
  if (rows_of_head > 0) {
    for (double& coverage : heads) coverage /= static_cast<double>(rows_of_head);
    report->heads.coverage = std::move(heads);
  }
  if (stats.coverage_rows > 0) {
    stats.coverage = sum / static_cast<double>(stats.coverage_rows);
  }
}

void WhatRan(const CudaAttentionPlan& plan, const Summary& summary,
             AttentionStats& stats) {
  bool all_dense = true;
  for (int32_t head = 0; head < plan.geometry.num_order_heads; ++head) {
    for (int32_t n = 0; n < static_cast<int32_t>(plan.sequences.size()); ++n) {
      if (plan.sequences[n].sparse == 0) continue;
      const bool fell = summary.FellBack(head, n);
      stats.dense_fallback |= fell;
      all_dense &= fell;
    }
  }
  stats.method_run = all_dense ? Method::kDense : plan.problem.options.method;
}

// The device's clock and the events that the total is from tick apart: nothing is
// below 0 for it.
void TellTimes(const RunSummary& run, double total_seconds, AttentionStats& stats) {
  const auto seconds = [](int64_t from, int64_t to) {
    return static_cast<double>(std::max<int64_t>(to - from, 0)) * 1e-9;
  };
  stats.permute_seconds = seconds(run.began, run.ordered);
  stats.select_seconds = seconds(run.ordered, run.listed);
  stats.attend_seconds =
      std::max(total_seconds - stats.permute_seconds - stats.select_seconds, 0.0);
}

// Rows of the lists by ListRow(), where every block is read.
std::vector<RanRow> CausalRows(const AttentionGeometry& g) {
  std::vector<RanRow> rows;
  for (const SequenceGeometry& s : g.sequences) {
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        rows.push_back({.entries = nullptr, .count = s.first_query_block + i + 1});
      }
    }
  }
  return rows;
}

// Rows of the lists by ListRow(), from the tiles that ran.
std::vector<RanRow> RowsOf(const CudaAttentionPlan& plan, const std::byte* workspace) {
  const AttentionGeometry& g = plan.geometry;
  if (!plan.has_lists) return CausalRows(g);
  const auto* tiles = reinterpret_cast<const AttentionTile*>(workspace + plan.tiles_at);
  const auto* entries = reinterpret_cast<const uint16_t*>(workspace + plan.entries_at);
  std::vector<RanRow> rows(static_cast<size_t>(plan.num_tiles()));
  for (size_t i = 0; i < rows.size(); ++i) {
    const AttentionTile& tile = tiles[i];
    const SequenceGeometry& s = g.sequences[tile.sequence];
    const int32_t block = tile.first_position / kTileRows;
    RanRow& row =
        rows[g.ListRow(tile.sequence, tile.head, block - s.first_query_block)];
    row.count = tile.list_count;
    if (tile.list_begin < 0) continue;
    row.entries = entries + tile.list_begin;
    // Gathered blocks, which are counted after all key blocks, come first.
    while (row.count > 0 && *row.entries >= s.num_key_blocks) {
      ++row.entries;
      --row.count;
    }
  }
  return rows;
}

std::vector<int32_t> OrderOf(const CudaAttentionPlan& plan,
                             const std::byte* workspace) {
  const AttentionGeometry& g = plan.geometry;
  const auto* positions =
      reinterpret_cast<const int32_t*>(workspace + plan.positions_at);
  std::vector<int32_t> order(static_cast<size_t>(g.num_order_heads * g.total_k));
  for (int32_t head = 0; head < g.num_order_heads; ++head) {
    for (const SequenceGeometry& s : g.sequences) {
      const auto out = order.begin() + head * g.total_k + s.k_begin;
      if (plan.permutes) {
        const int64_t copied = int64_t{plan.copied_blocks} * kBlockTokens;
        std::copy_n(positions + head * copied + s.slot_begin, s.k_len, out);
      } else {
        std::iota(out, out + s.k_len, 0);
      }
    }
  }
  return order;
}

std::vector<int32_t> SetBits(const uint32_t* words, int32_t count) {
  std::vector<int32_t> indices;
  for (int32_t i = 0; i < count; ++i) {
    if ((words[i / 32] >> i % 32 & 1) != 0) indices.push_back(i);
  }
  return indices;
}

// Lines of all sequences and heads; none where every block is read whole.
std::vector<ChosenLines> LinesOf(const CudaAttentionPlan& plan,
                                 const std::byte* workspace,
                                 const std::vector<RanRow>& rows) {
  const AttentionGeometry& g = plan.geometry;
  const auto words_of = [&](int64_t region, int32_t head, const SequenceRecord& s) {
    return reinterpret_cast<const uint32_t*>(workspace + region) +
           (int64_t{head} * plan.total_key_blocks + s.key_block_begin) *
               (kBlockTokens / 32);
  };
  std::vector<ChosenLines> lines;
  for (int32_t n = 0; n < static_cast<int32_t>(plan.sequences.size()); ++n) {
    const SequenceRecord& s = plan.sequences[n];
    for (int32_t head = 0; head < g.num_heads; ++head) {
      ChosenLines& chosen = lines.emplace_back();
      if (s.sparse == 0 || rows[g.ListRow(n, head, 0)].entries == nullptr) continue;
      chosen.columns =
          SetBits(words_of(plan.key_lines_at.column_bits, head, s), s.k_len);
      chosen.distances =
          SetBits(words_of(plan.key_lines_at.distance_bits, head, s), s.k_len);
    }
  }
  return lines;
}

}  // namespace

Status TellSummary(const CudaAttentionPlan& plan, const std::byte* summary,
                   double total_seconds, AttentionReport* report) {
  *report = {};
  const Summary ran(plan, summary);
  if (ran.head().non_finite != 0) return ScoreOverflow(plan.problem);
  TellBlocks(
      plan.geometry, ran.Blocks(),
      // Heads that fell back keep their permuted keys.
      [&](int32_t sequence, int32_t) { return plan.sequences[sequence].sparse == 0; },
      report);
  WhatRan(plan, ran, report->stats);
  TellCoverage(plan, ran, report);
  report->heads.guarded = ran.GuardedHeads();
  TellTimes(ran.head(), total_seconds, report->stats);
  return Status();
}

std::vector<ReportRegion> RegionsOf(const CudaAttentionPlan& plan,
                                    const ReportRequest& request) {
  std::vector<ReportRegion> regions;
  if (request.lists && plan.has_lists) {
    regions.push_back({plan.tiles_at,
                       plan.num_tiles() * static_cast<int64_t>(sizeof(AttentionTile))});
    regions.push_back({plan.entries_at, 2 * plan.total_entries});
    if (plan.chooses_key_lines) {
      regions.push_back({plan.key_lines_at.column_bits, plan.key_lines_at.bits_bytes});
      regions.push_back(
          {plan.key_lines_at.distance_bits, plan.key_lines_at.bits_bytes});
    }
  }
  if (request.order && plan.permutes) {
    regions.push_back({plan.positions_at, plan.memory.order_bytes});
  }
  return regions;
}

void TellRequested(const CudaAttentionPlan& plan, const std::byte* workspace,
                   const ReportRequest& request, AttentionReport* report) {
  if (request.order) report->order = OrderOf(plan, workspace);
  if (!request.lists) return;
  const std::vector<RanRow> rows = RowsOf(plan, workspace);
  if (plan.chooses_key_lines) report->lines = LinesOf(plan, workspace, rows);
  report->lists =
      RanLists(plan.geometry, [&](int32_t sequence, int32_t head, int32_t query_block) {
        return rows[plan.geometry.ListRow(sequence, head, query_block)];
      });
}

}  // namespace pbs::cuda
