// Rounding of the scores of keys and blocks, and the error of scores that overflow.
#pragma once

#include "pbs/attention.h"

namespace pbs {

// The dtype to which scores are rounded: with query-head scope the input dtype, as in
// the published code; else kF32, which means no rounding.
DType ScoreRoundingOf(const AttentionProblem& problem);

// The same of block means and of their products: pbs and mean_pooling are published
// with that rounding, other methods with sorted keys are not published.
DType BlockScoreRoundingOf(const AttentionProblem& problem);

// InvalidArgument for finite inputs whose scores are not finite.
Status ScoreOverflow(const AttentionProblem& problem);

}  // namespace pbs
