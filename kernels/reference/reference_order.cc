// The key order of the reference: keys sorted inside segments by importance.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "reference/operands.h"
#include "reference/reference_attention.h"
#include "reference/reference_order.h"

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

std::vector<double> Importance(const AttentionProblem& problem, const Operands& in,
                               const AttentionGeometry& g, int32_t order_head) {
  const ScoreRounding round = ScoreRounding::OfKeys(problem);
  const int32_t body = in.shape().k_len / g.segment_size * g.segment_size;
  std::vector<double> importance(static_cast<size_t>(body));
  const int32_t num_members = g.num_heads / g.num_order_heads;
  for (int32_t member = 0; member < num_members; ++member) {
    AddHeadImportance(in, g, round, order_head * num_members + member,
                      1.0 / num_members, importance);
  }
  return importance;
}

}  // namespace

std::vector<int32_t> OrderOf(const AttentionProblem& problem, const Operands& in,
                             const AttentionGeometry& g, int32_t order_head) {
  const SequenceGeometry& s = in.shape();
  std::vector<int32_t> order(static_cast<size_t>(s.k_len));
  std::iota(order.begin(), order.end(), 0);
  if (!Permutes(problem.options) || s.dense || s.q_len == 0) return order;
  if (problem.options.use_given_order) {
    for (int32_t slot = 0; slot < s.k_len; ++slot) {
      order[slot] = in.GivenOrder(order_head, slot);
    }
    return order;
  }
  const std::vector<double> importance = Importance(problem, in, g, order_head);
  for (size_t begin = 0; begin < importance.size(); begin += g.segment_size) {
    std::stable_sort(
        order.begin() + begin, order.begin() + begin + g.segment_size,
        [&](int32_t a, int32_t b) { return importance[a] > importance[b]; });
  }
  return order;
}

std::vector<double> KeyImportance(const AttentionProblem& problem,
                                  const AttentionTensors& tensors, int32_t sequence,
                                  int32_t order_head) {
  const AttentionGeometry g = MakeGeometry(problem);
  return Importance(problem, Operands(problem, tensors, g, sequence), g, order_head);
}

}  // namespace pbs::reference
