// The largest of several errors of outputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace pbs::testing_support {

// The larger error. NaN, for which every comparison is false, counts as the largest.
inline double LargerError(double largest, double error) {
  if (std::isnan(error)) return std::numeric_limits<double>::infinity();
  return std::max(largest, error);
}

}  // namespace pbs::testing_support
