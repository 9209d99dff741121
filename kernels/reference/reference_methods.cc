#include <algorithm>
#include <cmath>
#include <numeric>

#include "pbs/block_mask.h"
#include "reference/operands.h"
#include "reference/reference_attention.h"

namespace pbs::reference {
namespace {

double Dot(const Operands& in, int32_t head, int32_t row, int32_t kv_head, int32_t key,
           int32_t head_dim) {
  double sum = 0;
  for (int32_t d = 0; d < head_dim; ++d) {
    sum += in.Q(head, row, d) * in.K(kv_head, key, d);
  }
  return sum;
}

// Adds one query head's importance (sections 2.2-2.4), scaled by `weight`.
void AddHeadImportance(const Operands& in, const AttentionGeometry& g,
                       const ScoreRounding& round, int32_t head, double weight,
                       std::vector<double>& importance) {
  const SequenceGeometry& s = in.shape();
  const int32_t num_proxies = std::min(g.block_size, s.q_len);
  std::vector<double> row(importance.size());
  for (int32_t proxy = s.q_len - num_proxies; proxy < s.q_len; ++proxy) {
    for (size_t key = 0; key < row.size(); ++key) {
      const double dot =
          Dot(in, head, proxy, g.KvHead(head), static_cast<int32_t>(key), g.head_dim);
      row[key] = round(round(dot) / std::sqrt(g.head_dim));
    }
    Softmax(row);
    for (size_t key = 0; key < row.size(); ++key) {
      importance[key] += weight * row[key] / num_proxies;
    }
  }
}

std::vector<int32_t> OrderOf(const AttentionProblem& problem,
                             const AttentionTensors& tensors,
                             const AttentionGeometry& g, int32_t sequence,
                             int32_t order_head) {
  const SequenceGeometry& s = g.sequences[sequence];
  std::vector<int32_t> order(static_cast<size_t>(s.k_len));
  std::iota(order.begin(), order.end(), 0);
  if (problem.options.method != Method::kPbs || s.dense || s.q_len == 0) return order;
  if (problem.options.use_given_order) {
    const Operands in(problem, tensors, g, sequence);
    for (int32_t slot = 0; slot < s.k_len; ++slot) {
      order[slot] = in.GivenOrder(order_head, slot);
    }
    return order;
  }
  const auto importance = KeyImportance(problem, tensors, sequence, order_head);
  for (size_t begin = 0; begin < importance.size(); begin += g.segment_size) {
    std::stable_sort(
        order.begin() + begin, order.begin() + begin + g.segment_size,
        [&](int32_t a, int32_t b) { return importance[a] > importance[b]; });
  }
  return order;
}

// Block means; a short block is divided by block_size all the same (section 3.1).
template <class Element>
std::vector<double> BlockMeans(const AttentionGeometry& g, int32_t first_block,
                               int32_t num_blocks, int32_t begin, int32_t end,
                               const ScoreRounding& round, Element&& element) {
  std::vector<double> means(static_cast<size_t>(num_blocks) * g.head_dim);
  for (int32_t position = begin; position < end; ++position) {
    const int32_t block = position / g.block_size - first_block;
    for (int32_t d = 0; d < g.head_dim; ++d) {
      means[block * g.head_dim + d] += element(position, d) / g.block_size;
    }
  }
  for (double& mean : means) mean = round(mean);
  return means;
}

// Candidates whose largest probabilities reach the threshold (sections 3.4-3.6).
std::vector<bool> Cover(std::vector<double> logits, double threshold) {
  std::vector<bool> keep(logits.size(), threshold >= 1.0);
  if (threshold >= 1.0) return keep;
  Softmax(logits);
  std::vector<int32_t> by(logits.size());
  std::iota(by.begin(), by.end(), 0);
  std::stable_sort(by.begin(), by.end(),
                   [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  double mass = 0;
  for (int32_t block : by) {
    keep[block] = true;
    mass += logits[block];
    if (mass >= threshold) break;
  }
  return keep;
}

void SelectHead(const AttentionProblem& problem, const AttentionTensors& tensors,
                const AttentionGeometry& g, int32_t sequence, int32_t head,
                const int32_t* order, std::vector<uint8_t>& mask) {
  const SequenceGeometry& s = g.sequences[sequence];
  const Operands in(problem, tensors, g, sequence);
  const ScoreRounding round(problem);
  const auto mean_q =
      BlockMeans(g, s.first_query_block, s.num_query_blocks, s.query_offset, s.k_len,
                 round, [&](int32_t position, int32_t d) {
                   return in.Q(head, position - s.query_offset, d);
                 });
  const auto mean_k = BlockMeans(
      g, 0, s.num_key_blocks, 0, s.k_len, round,
      [&](int32_t slot, int32_t d) { return in.K(g.KvHead(head), order[slot], d); });
  const auto first_key = std::find(order, order + s.k_len, 0) - order;
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    const int32_t block = s.first_query_block + i;
    const int32_t own = block / g.blocks_per_segment * g.blocks_per_segment;
    const int32_t own_end = g.RowCapacity(s, block);
    const bool own_has_mass = problem.options.method == Method::kMeanPooling;
    std::vector<double> logits(static_cast<size_t>(own_has_mass ? block + 1 : own));
    for (size_t j = 0; j < logits.size(); ++j) {
      double dot = 0;
      for (int32_t d = 0; d < g.head_dim; ++d) {
        dot += mean_q[i * g.head_dim + d] * mean_k[j * g.head_dim + d];
      }
      logits[j] = round(round(dot) / std::sqrt(g.head_dim));
    }
    const auto keep = Cover(logits, problem.options.threshold);
    const size_t row = mask.size();
    mask.resize(row + s.num_key_blocks);
    std::copy(keep.begin(), keep.end(), mask.begin() + row);
    std::fill(mask.begin() + row + own, mask.begin() + row + own_end, 1);
    if (problem.options.force_first_block) mask[row + first_key / g.block_size] = 1;
  }
}

void CausalHead(const SequenceGeometry& s, std::vector<uint8_t>& mask) {
  for (int32_t i = 0; i < s.num_query_blocks; ++i) {
    for (int32_t j = 0; j < s.num_key_blocks; ++j) {
      mask.push_back(j <= s.first_query_block + i);
    }
  }
}

// Masks of the query heads that share one order; identity and causal where the dense
// fallback fires.
void AppendOrderHead(const AttentionProblem& problem, const AttentionTensors& tensors,
                     const AttentionGeometry& g, int32_t sequence, int32_t order_head,
                     std::vector<int32_t>& order, std::vector<uint8_t>& mask,
                     Decision& decision) {
  const SequenceGeometry& s = g.sequences[sequence];
  const int32_t num_members = g.num_heads / g.num_order_heads;
  const bool selects = !s.dense && !problem.options.use_given_lists;
  decision.ran_dense.push_back(s.dense ? 1 : 0);
  const size_t begin = mask.size();
  for (int32_t member = 0; member < num_members; ++member) {
    if (selects) {
      SelectHead(problem, tensors, g, sequence, order_head * num_members + member,
                 order.data(), mask);
    } else {
      CausalHead(s, mask);
    }
  }
  if (!selects || !problem.options.dense_fallback) return;
  std::vector<uint8_t> causal;
  for (int32_t member = 0; member < num_members; ++member) CausalHead(s, causal);
  const auto executed = std::count(mask.begin() + begin, mask.end(), 1);
  const auto all = std::count(causal.begin(), causal.end(), 1);
  if (executed < kDenseFallbackRatio * all) return;
  std::copy(causal.begin(), causal.end(), mask.begin() + begin);
  std::iota(order.begin(), order.end(), 0);
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

std::vector<double> KeyImportance(const AttentionProblem& problem,
                                  const AttentionTensors& tensors, int32_t sequence,
                                  int32_t order_head) {
  const AttentionGeometry g = MakeGeometry(problem);
  const SequenceGeometry& s = g.sequences[sequence];
  const Operands in(problem, tensors, g, sequence);
  const ScoreRounding round(problem);
  const int32_t body = s.k_len / g.segment_size * g.segment_size;
  std::vector<double> importance(static_cast<size_t>(body));
  const int32_t num_members = g.num_heads / g.num_order_heads;
  for (int32_t member = 0; member < num_members; ++member) {
    AddHeadImportance(in, g, round, order_head * num_members + member,
                      1.0 / num_members, importance);
  }
  return importance;
}

Decision Decide(const AttentionProblem& problem, const AttentionTensors& tensors) {
  const AttentionGeometry g = MakeGeometry(problem);
  Decision decision;
  decision.order.resize(static_cast<size_t>(g.num_order_heads * g.total_k));
  std::vector<uint8_t> mask;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    std::vector<std::vector<int32_t>> orders;
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      orders.push_back(OrderOf(problem, tensors, g, n, head));
    }
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      AppendOrderHead(problem, tensors, g, n, head, orders[head], mask, decision);
      std::copy(orders[head].begin(), orders[head].end(),
                decision.order.begin() + head * g.total_k + s.k_begin);
    }
  }
  decision.lists = problem.options.use_given_lists ? CopyLists(tensors.lists)
                                                   : *ListsFromMask(g, mask);
  return decision;
}

}  // namespace pbs::reference
