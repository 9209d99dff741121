// The rules of the reference: which blocks are kept, given their scores. Private to the
// reference.
#pragma once

#include <cstdint>
#include <vector>

namespace pbs::reference {

// Indices by falling score; of equal scores the lower index first.
std::vector<int32_t> ByFallingScore(const std::vector<double>& scores);

// Softmaxes `logits` and keeps the fewest largest whose mass reaches `threshold`; all
// of them when it is 1.
std::vector<bool> Cover(std::vector<double> logits, double threshold);

// Blocks that CoverWithForced() always keeps; -1: none.
struct ForcedMass {
  int32_t own = -1;
  int32_t first = -1;
  // As published for the rows of the first chunk.
  bool lags = false;
};

// Keeps the forced blocks, then the largest others while what was taken before has less
// than `threshold` of the sum; all of them when it is 1.
//
// With `lags` the mass of `first` competes like that of any other block; the largest
// other is always taken; and the r-th is taken when `own` and the r - 2 largest have
// less than `threshold` of the sum.
std::vector<bool> CoverWithForced(const std::vector<double>& masses, double threshold,
                                  const ForcedMass& forced);

// Keeps the scores of at least `share` of the largest.
std::vector<bool> ShareOfLargest(const std::vector<double>& scores, double share);

}  // namespace pbs::reference
