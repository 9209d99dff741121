// Rotary position embedding: rotate-half, dimension i pairs with i + head_dim / 2.
//
// Angles are position times inverse frequency, computed and reduced in f64
// (RotationsOp), so that they are right at any position; cosines and sines are f32 and
// carry the attention factor of yarn (and therefore so do cached keys).
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "server/model/rope_config.h"

namespace pbs {

// [head_dim / 2], falling.
std::vector<double> InverseFrequencies(const RopeConfig& rope, int32_t head_dim);

}  // namespace pbs
