// Errors of outputs, of which the largest counts.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace pbs::testing_support {

// The larger one; NaN, which every comparison would pass over, is larger than any.
inline double LargerError(double largest, double error) {
  if (std::isnan(error)) return std::numeric_limits<double>::infinity();
  return std::max(largest, error);
}

}  // namespace pbs::testing_support
