// Reads operands of any dtype and layout as f64. Private to the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "pbs/attention.h"

namespace pbs::reference {

// One sequence's view of the problem: element access by (head, row, dim).
class Operands {
 public:
  Operands(const AttentionProblem& problem, const AttentionTensors& tensors,
           const AttentionGeometry& geometry, int32_t sequence)
      : dtype_(problem.dtype),
        tensors_(tensors),
        s_(geometry.sequences[sequence]),
        sequence_(sequence) {}

  double Q(int32_t head, int32_t row, int32_t d) const {
    return Read(tensors_.q, s_.q_begin, head, row, d);
  }
  double K(int32_t head, int32_t key, int32_t d) const {
    return Read(tensors_.k, s_.k_begin, head, key, d);
  }
  double V(int32_t head, int32_t key, int32_t d) const {
    return Read(tensors_.v, s_.k_begin, head, key, d);
  }
  int32_t GivenOrder(int32_t head, int32_t slot) const {
    const RowLayout& layout = tensors_.order.layout;
    return static_cast<const int32_t*>(
        tensors_.order.data)[layout.Offset(sequence_, s_.k_begin, head, slot)];
  }
  const SequenceGeometry& shape() const { return s_; }

 private:
  double Read(const ConstRows& rows, int64_t before, int32_t head, int32_t row,
              int32_t d) const {
    const int64_t at = rows.layout.Offset(sequence_, before, head, row) + d;
    return VisitDType(dtype_, [&](auto element) -> double {
      return ToFloat(static_cast<const decltype(element)*>(rows.data)[at]);
    });
  }

  DType dtype_;
  const AttentionTensors& tensors_;
  const SequenceGeometry& s_;
  int32_t sequence_;
};

// Query-head scope repeats the published code's rounding of intermediate scores to the
// input dtype; every other case keeps full precision.
class ScoreRounding {
 public:
  explicit ScoreRounding(const AttentionProblem& problem)
      : dtype_(problem.options.method == Method::kPbs &&
                       problem.options.scope == Scope::kQueryHead
                   ? problem.dtype
                   : DType::kF32) {}

  double operator()(double value) const {
    const auto narrow = static_cast<float>(value);
    if (dtype_ == DType::kF16) return ToFloat(ToF16(narrow));
    if (dtype_ == DType::kBF16) return ToFloat(ToBf16(narrow));
    return value;
  }

 private:
  DType dtype_;
};

// Softmax in place; a row that is wholly -inf becomes zeros.
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
