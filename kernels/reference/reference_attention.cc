#include "reference/reference_attention.h"

#include <algorithm>
#include <cmath>

#include "reference/operands.h"

namespace pbs::reference {
namespace {

// Calls visit(operands, sequence, head, query row, list row) for every query row.
template <class Visitor>
void ForEachQuery(const AttentionProblem& problem, const AttentionTensors& tensors,
                  const AttentionGeometry& g, Visitor&& visit) {
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    const Operands in(problem, tensors, g, n);
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t row = 0; row < s.q_len; ++row) {
        const int32_t block = (s.query_offset + row) / g.block_size;
        visit(in, n, head, row, g.ListRow(n, head, block - s.first_query_block));
      }
    }
  }
}

double Dot(const Operands& in, const AttentionGeometry& g, int32_t head, int32_t row,
           int32_t key, LogitSum logit_sum) {
  double wide = 0;
  float narrow = 0;
  for (int32_t d = 0; d < g.head_dim; ++d) {
    const double q = in.Q(head, row, d);
    const double k = in.K(g.KvHead(head), key, d);
    if (logit_sum == LogitSum::kF64) {
      wide += q * k;
    } else {
      narrow = std::fma(static_cast<float>(q), static_cast<float>(k), narrow);
    }
  }
  return logit_sum == LogitSum::kF64 ? wide : narrow;
}

// Scaled logits of one query row against every key; keys it must not see are -inf.
std::vector<double> CausalLogits(const Operands& in, const AttentionGeometry& g,
                                 int32_t head, int32_t row,
                                 LogitSum logit_sum = LogitSum::kF64) {
  const SequenceGeometry& s = in.shape();
  std::vector<double> logits(static_cast<size_t>(s.k_len), -INFINITY);
  for (int32_t key = 0; key <= s.query_offset + row; ++key) {
    logits[key] = Dot(in, g, head, row, key, logit_sum) / std::sqrt(g.head_dim);
  }
  return logits;
}

// Which original keys the row's list reads.
std::vector<bool> SelectedKeys(const AttentionGeometry& g, const SequenceGeometry& s,
                               const int32_t* order, std::span<const uint16_t> list) {
  std::vector<bool> selected(static_cast<size_t>(s.k_len));
  for (uint16_t block : list) {
    const int32_t end = std::min((block + 1) * g.block_size, s.k_len);
    for (int32_t slot = block * g.block_size; slot < end; ++slot) {
      selected[order[slot]] = true;
    }
  }
  return selected;
}

const int32_t* OrderOf(const AttentionGeometry& g, const Decision& decision,
                       int32_t sequence, int32_t head) {
  return decision.order.data() + g.OrderHead(head) * g.total_k +
         g.sequences[sequence].k_begin;
}

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
        for (uint16_t j : lists.Row(g.ListRow(n, head, i))) {
          ++stats.executed_blocks;
          stats.lower_blocks += j <= block;
        }
      }
    }
  }
  const double block_flops = 4.0 * g.block_size * g.block_size * g.head_dim;
  stats.executed_flops = block_flops * static_cast<double>(stats.executed_blocks);
  stats.dense_flops = block_flops * static_cast<double>(stats.dense_blocks);
}

}  // namespace

Output Attend(const AttentionProblem& problem, const AttentionTensors& tensors,
              const Decision& decision, LogitSum logit_sum) {
  const AttentionGeometry g = MakeGeometry(problem);
  const BlockListsView lists = decision.lists.View();
  Output out;
  out.o.resize(static_cast<size_t>(g.num_heads * g.total_q * g.head_dim));
  out.lse.resize(static_cast<size_t>(g.num_heads * g.total_q));
  ForEachQuery(
      problem, tensors, g,
      [&](const Operands& in, int32_t n, int32_t head, int32_t row, int64_t list_row) {
        const SequenceGeometry& s = g.sequences[n];
        auto logits = CausalLogits(in, g, head, row, logit_sum);
        const auto selected =
            SelectedKeys(g, s, OrderOf(g, decision, n, head), lists.Row(list_row));
        double top = -INFINITY;
        for (int32_t key = 0; key < s.k_len; ++key) {
          if (!selected[key]) logits[key] = -INFINITY;
          top = std::max(top, logits[key]);
        }
        const int64_t at = head * g.total_q + s.q_begin + row;
        out.lse[at] = -INFINITY;
        if (std::isinf(top)) return;
        double sum = 0;
        double* o = out.o.data() + at * g.head_dim;
        for (int32_t key = 0; key < s.k_len; ++key) {
          const double weight = std::exp(logits[key] - top);
          if (weight == 0) continue;
          sum += weight;
          for (int32_t d = 0; d < g.head_dim; ++d) {
            o[d] += weight * in.V(g.KvHead(head), key, d);
          }
        }
        for (int32_t d = 0; d < g.head_dim; ++d) o[d] /= sum;
        out.lse[at] = top + std::log(sum);
      });
  return out;
}

double Coverage(const AttentionProblem& problem, const AttentionTensors& tensors,
                const Decision& decision) {
  const AttentionGeometry g = MakeGeometry(problem);
  const BlockListsView lists = decision.lists.View();
  double total = 0;
  int64_t num_rows = 0;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    const Operands in(problem, tensors, g, n);
    const int32_t rows = std::min(problem.options.coverage_rows, s.q_len);
    for (int32_t head = 0; head < g.num_heads; ++head) {
      for (int32_t i = 0; i < rows; ++i) {
        const int32_t row = CoverageRow(i, rows, s.q_len);
        auto mass = CausalLogits(in, g, head, row);
        Softmax(mass);
        const int32_t block = (s.query_offset + row) / g.block_size;
        const auto selected =
            SelectedKeys(g, s, OrderOf(g, decision, n, head),
                         lists.Row(g.ListRow(n, head, block - s.first_query_block)));
        for (int32_t key = 0; key < s.k_len; ++key) {
          if (selected[key]) total += mass[key];
        }
        ++num_rows;
      }
    }
  }
  return num_rows == 0 ? 0.0 : total / static_cast<double>(num_rows);
}

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
