// How scores of keys and blocks are rounded, and what is said when they overflow.
#pragma once

#include "pbs/attention.h"

namespace pbs {

// Query-head scope repeats the published code's rounding of scores to the input dtype:
// kF32 means none.
DType ScoreRoundingOf(const AttentionProblem& problem);

// InvalidArgument: finite inputs whose scores are not.
Status ScoreOverflow(const AttentionProblem& problem);

}  // namespace pbs
