// What the reference decides: key orders and block lists of every head.
#include <algorithm>
#include <numeric>
#include <vector>

#include "pbs/block_mask.h"
#include "pbs/check.h"
#include "reference/operands.h"
#include "reference/reference_attention.h"
#include "reference/reference_order.h"
#include "reference/reference_select.h"
#include "reference/reference_spans.h"

namespace pbs::reference {
namespace {

Kept KeepByScore(const SelectingHead& head) {
  switch (TraitsOf(head.options().method).scorer) {
    case Scorer::kMeans:
      return SelectByMeans(head);
    case Scorer::kBands:
      return SelectByBands(head);
    case Scorer::kRows:
      return SelectByRows(head);
    case Scorer::kAntidiagonal:
      return SelectByAntidiagonals(head);
    case Scorer::kLines:
      return SelectByLines(head);
    case Scorer::kNone:
      break;
  }
  PBS_CHECK(false && "the method selects no blocks");
}

bool ChoosesLines(const AttentionProblem& problem) {
  return TraitsOf(problem.options.method).rule == Rule::kLargestLines &&
         !problem.options.use_given_lists;
}

// `lines`: of the head, where it has them.
void AppendSelected(const SelectingHead& head, std::vector<uint8_t>& mask,
                    ChosenLines* lines) {
  if (lines != nullptr) *lines = ChooseLines(head);
  const Kept kept = lines != nullptr ? KeepSpans(head, *lines) : KeepByScore(head);
  const int32_t first_block = head.FirstBlock();
  for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
    const int32_t own_begin = head.OwnBegin(i);
    const int32_t own_end = head.g.RowCapacity(head.s(), head.Block(i));
    for (int32_t j = 0; j < head.s().num_key_blocks; ++j) {
      const bool earlier = j < own_begin;
      const bool own = !earlier && j < own_end;
      const bool forced = IsForced(head.options(), head.s(), i, j) ||
                          (ForcesFirstBlock(head.options()) && j == first_block);
      mask.push_back(own || (earlier && (kept[i][j] || forced)));
    }
  }
}

// The problem of one query head, as its own threshold makes it.
AttentionProblem ProblemOfHead(const AttentionProblem& problem,
                               const AttentionTensors& tensors, int32_t head) {
  AttentionProblem own = problem;
  if (problem.has_head_thresholds) {
    own.options.threshold = tensors.head_thresholds[head];
  }
  return own;
}

void AppendCausal(const SequenceGeometry& s, std::vector<uint8_t>& mask) {
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    for (int32_t j = 0; j < s.num_key_blocks; ++j) {
      mask.push_back(j <= s.first_query_block + i);
    }
  }
}

// Masks and lines of the query heads that share one order; identity and causal where
// the dense fallback fires.
void AppendOrderHead(const AttentionProblem& problem, const AttentionTensors& tensors,
                     const Operands& in, const AttentionGeometry& g, int32_t sequence,
                     int32_t order_head, std::vector<int32_t>& order,
                     std::vector<uint8_t>& mask, Decision& decision) {
  const SequenceGeometry& s = in.shape();
  const int32_t num_members = g.num_heads / g.num_order_heads;
  const bool selects = !s.dense && s.q_len > 0 && !problem.options.use_given_lists;
  decision.ran_dense.push_back(s.dense ? 1 : 0);
  const size_t begin = mask.size();
  for (int32_t member = 0; member < num_members; ++member) {
    if (selects) {
      const int32_t head = order_head * num_members + member;
      const AttentionProblem own = ProblemOfHead(problem, tensors, head);
      const SelectingHead selecting = {own, g, in, head, order.data()};
      const size_t head_begin = mask.size();
      AppendSelected(selecting, mask,
                     ChoosesLines(problem)
                         ? &decision.lines[sequence * g.num_heads + head]
                         : nullptr);
      if (problem.options.coverage_min > 0 &&
          GuardHead(selecting, mask.data() + head_begin)) {
        decision.guarded_heads.insert(head);
      }
    } else {
      AppendCausal(s, mask);
    }
  }
  if (!selects || !problem.options.dense_fallback) return;
  std::vector<uint8_t> causal;
  for (int32_t member = 0; member < num_members; ++member) AppendCausal(s, causal);
  const auto executed = std::count(mask.begin() + begin, mask.end(), 1);
  const auto all = std::count(causal.begin(), causal.end(), 1);
  if (executed < kDenseFallbackRatio * all) return;
  std::copy(causal.begin(), causal.end(), mask.begin() + begin);
  std::iota(order.begin(), order.end(), 0);
  if (ChoosesLines(problem)) {
    const auto first =
        decision.lines.begin() + sequence * g.num_heads + order_head * num_members;
    std::fill(first, first + num_members, ChosenLines());
  }
  ++decision.heads_fallen_back;
  decision.ran_dense.back() = 1;
}

BlockLists CopyLists(const BlockListsView& view) {
  BlockLists lists;
  for (int64_t row = 0; row < view.num_rows; ++row) {
    const auto entries = view.Row(row);
    lists.begin.push_back(static_cast<int64_t>(lists.indices.size()));
    lists.count.push_back(view.count[row]);
    lists.num_masked.push_back(0);
    lists.indices.insert(lists.indices.end(), entries.begin(), entries.end());
  }
  return lists;
}

}  // namespace

LineMasses MassesOfLines(const AttentionProblem& problem,
                         const AttentionTensors& tensors, int32_t sequence,
                         int32_t head) {
  const AttentionGeometry g = MakeGeometry(problem);
  const Operands in(problem, tensors, g, sequence);
  const std::vector<int32_t> order = OrderOf(problem, in, g, g.OrderHead(head));
  return MeasureLastQueries({problem, g, in, head, order.data()});
}

Decision Decide(const AttentionProblem& problem, const AttentionTensors& tensors) {
  const AttentionGeometry g = MakeGeometry(problem);
  Decision decision;
  decision.order.resize(static_cast<size_t>(g.num_order_heads * g.total_k));
  if (ChoosesLines(problem)) {
    decision.lines.resize(g.sequences.size() * static_cast<size_t>(g.num_heads));
  }
  std::vector<uint8_t> mask;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    const Operands in(problem, tensors, g, n);
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      std::vector<int32_t> order = OrderOf(problem, in, g, head);
      AppendOrderHead(problem, tensors, in, g, n, head, order, mask, decision);
      std::copy(order.begin(), order.end(),
                decision.order.begin() + head * g.total_k + s.k_begin);
    }
  }
  decision.lists = problem.options.use_given_lists ? CopyLists(tensors.lists)
                                                   : *ListsFromMask(g, mask);
  return decision;
}

}  // namespace pbs::reference
