// Reads operands of any dtype and layout as f64. Private to the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "pbs/attention.h"

namespace pbs::reference {

// One sequence's operands as f64: element access by (head, row, dim).
class Operands {
 public:
  Operands(const AttentionProblem& problem, const AttentionTensors& tensors,
           const AttentionGeometry& geometry, int32_t sequence)
      : g_(geometry),
        s_(geometry.sequences[sequence]),
        order_(tensors.order),
        sequence_(sequence),
        q_(Widen(problem.dtype, tensors.q, g_.num_heads, s_.q_begin, s_.q_len)),
        k_(Widen(problem.dtype, tensors.k, g_.num_kv_heads, s_.k_begin, s_.k_len)),
        v_(Widen(problem.dtype, tensors.v, g_.num_kv_heads, s_.k_begin, s_.k_len)) {}

  double Q(int32_t head, int32_t row, int32_t d) const {
    return q_[(static_cast<int64_t>(head) * s_.q_len + row) * g_.head_dim + d];
  }
  double K(int32_t head, int32_t key, int32_t d) const {
    return k_[(static_cast<int64_t>(head) * s_.k_len + key) * g_.head_dim + d];
  }
  double V(int32_t head, int32_t key, int32_t d) const {
    return v_[(static_cast<int64_t>(head) * s_.k_len + key) * g_.head_dim + d];
  }
  int32_t GivenOrder(int32_t head, int32_t slot) const {
    return static_cast<const int32_t*>(
        order_.data)[order_.layout.Offset(sequence_, s_.k_begin, head, slot)];
  }
  const SequenceGeometry& shape() const { return s_; }

 private:
  std::vector<double> Widen(DType dtype, const ConstRows& rows, int32_t heads,
                            int64_t before, int32_t num_rows) const {
    std::vector<double> wide;
    wide.reserve(static_cast<size_t>(heads) * num_rows * g_.head_dim);
    VisitDType(dtype, [&](auto element) {
      for (int32_t head = 0; head < heads; ++head) {
        for (int32_t row = 0; row < num_rows; ++row) {
          const auto* at = static_cast<const decltype(element)*>(rows.data) +
                           rows.layout.Offset(sequence_, before, head, row);
          for (int32_t d = 0; d < g_.head_dim; ++d) wide.push_back(ToFloat(at[d]));
        }
      }
    });
    return wide;
  }

  const AttentionGeometry& g_;
  const SequenceGeometry& s_;
  const ConstRows order_;
  const int32_t sequence_;
  const std::vector<double> q_, k_, v_;
};

// With query-head scope, the scores of keys and the means of pbs and mean_pooling are
// rounded to the input dtype, as in the published code. All other scores keep full
// precision.
class ScoreRounding {
 public:
  static ScoreRounding OfKeys(const AttentionProblem& problem) {
    const bool rounds =
        Permutes(problem.options) && problem.options.scope == Scope::kQueryHead;
    return ScoreRounding(rounds ? problem.dtype : DType::kF32);
  }
  static ScoreRounding OfBlocks(const AttentionProblem& problem) {
    const bool of_means = TraitsOf(problem.options.method).scorer == Scorer::kMeans;
    return of_means ? OfKeys(problem) : ScoreRounding(DType::kF32);
  }

  double operator()(double value) const {
    const auto narrow = static_cast<float>(value);
    if (dtype_ == DType::kF16) return ToFloat(ToF16(narrow));
    if (dtype_ == DType::kBF16) return ToFloat(ToBf16(narrow));
    return value;
  }

 private:
  explicit ScoreRounding(DType dtype) : dtype_(dtype) {}

  DType dtype_;
};

// Softmax in place. A row that is -inf everywhere becomes zeros.
inline void Softmax(std::vector<double>& row) {
  double top = -INFINITY;
  for (double x : row) top = std::max(top, x);
  double sum = 0;
  for (double& x : row) {
    x = std::isinf(top) ? 0.0 : std::exp(x - top);
    sum += x;
  }
  for (double& x : row) x = sum > 0 ? x / sum : 0.0;
}

}  // namespace pbs::reference
