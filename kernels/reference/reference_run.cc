// Decision, attention and statistics of the reference together.
#include <algorithm>

#include "reference/reference_attention.h"
#include "reference/reference_spans.h"

namespace pbs::reference {
namespace {

void CountBlocks(const AttentionGeometry& g, const Decision& decision,
                 AttentionStats& stats) {
  const BlockListsView lists = decision.lists.View();
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    for (int32_t head = 0; head < g.num_heads; ++head) {
      const bool permuted =
          decision.ran_dense[n * g.num_order_heads + g.OrderHead(head)] == 0;
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        const int32_t block = s.first_query_block + i;
        const int32_t segment_end =
            (block / g.blocks_per_segment + 1) * g.blocks_per_segment;
        stats.causal_blocks += block + 1;
        stats.dense_blocks +=
            permuted ? std::min(segment_end, s.num_key_blocks) : block + 1;
        // Every row counts all blocks of gathered columns, and no more blocks in sum
        // than it could read.
        int64_t executed =
            decision.lines.empty()
                ? 0
                : GatheredBlocks(decision.lines[n * g.num_heads + head], g.block_size);
        int64_t lower = executed;
        for (uint16_t j : lists.Row(g.ListRow(n, head, i))) {
          ++executed;
          lower += j <= block;
        }
        stats.executed_blocks +=
            std::min<int64_t>(executed, std::min(segment_end, s.num_key_blocks));
        stats.lower_blocks += std::min<int64_t>(lower, block + 1);
      }
    }
  }
  const double block_flops = 4.0 * g.block_size * g.block_size * g.head_dim;
  stats.executed_flops = block_flops * static_cast<double>(stats.executed_blocks);
  stats.dense_flops = block_flops * static_cast<double>(stats.dense_blocks);
}

}  // namespace

Result Run(const AttentionProblem& problem, const AttentionTensors& tensors) {
  Result result;
  const AttentionGeometry g = MakeGeometry(problem);
  result.decision = Decide(problem, tensors);
  AttentionStats& stats = result.stats;
  CountBlocks(g, result.decision, stats);
  result.output = Attend(problem, tensors, result.decision);
  int32_t sparse_heads = 0;
  for (const SequenceGeometry& s : g.sequences) {
    if (!s.dense && s.q_len > 0) sparse_heads += g.num_order_heads;
  }
  const int32_t fallen_back = result.decision.heads_fallen_back;
  stats.dense_fallback = fallen_back > 0;
  stats.method_run =
      fallen_back == sparse_heads ? Method::kDense : problem.options.method;
  stats.coverage = Coverage(problem, tensors, result.decision);
  for (const SequenceGeometry& s : g.sequences) {
    stats.coverage_rows += static_cast<int64_t>(g.num_heads) *
                           std::min(problem.options.coverage_rows, s.q_len);
  }
  return result;
}

}  // namespace pbs::reference
