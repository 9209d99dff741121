// Rotary position embedding: rotate-half, dimension i pairs with i + head_dim / 2.
//
// Angles are position times inverse frequency, computed and reduced in f64
// (RotationsOp), so that they are exact enough at any position. Cosines and sines are
// f32 and include yarn's attention factor, so cached keys include it too.
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "server/model/rope_config.h"

namespace pbs {

// Inverse frequencies, [head_dim / 2], in falling order.
std::vector<double> InverseFrequencies(const RopeConfig& rope, int32_t head_dim);

}  // namespace pbs
