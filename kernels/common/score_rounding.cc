#include "common/score_rounding.h"

#include <string>

namespace pbs {

DType ScoreRoundingOf(const AttentionProblem& problem) {
  const bool rounds =
      Permutes(problem.options) && problem.options.scope == Scope::kQueryHead;
  return rounds ? problem.dtype : DType::kF32;
}

DType BlockScoreRoundingOf(const AttentionProblem& problem) {
  const bool of_means = TraitsOf(problem.options.method).scorer == Scorer::kMeans;
  return of_means ? ScoreRoundingOf(problem) : DType::kF32;
}

Status ScoreOverflow(const AttentionProblem& problem) {
  if (ScoreRoundingOf(problem) == DType::kF16) {
    return InvalidArgument(
        "attention scores pass the largest f16, 65504, to which scope " +
        std::string(ScopeName(problem.options.scope)) +
        " rounds them; use scope kv_head, bf16 or smaller inputs");
  }
  return InvalidArgument(
      "attention scores pass the largest f32, 3.4e38: products of q and k are too "
      "large");
}

}  // namespace pbs
