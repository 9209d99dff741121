// How far attention may be from the reference, with the derivation of each bound.
// Raising one needs a commit of its own with the reason.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pbs/dtype.h"

namespace pbs::testing_support {

// Largest |o - reference| where both read the same blocks. `pairs`: bf16 probabilities
// are multiplied as pairs.
//   f32   a dot product of head_dim terms of magnitude up to 10 rounds like a random
//         walk of sqrt(head_dim) steps of 2^-24 * 10; the output follows the logit
//   f16   half an ulp of outputs of magnitude up to 4
//   bf16  the same, and with pairs half an ulp of probabilities (2^-9)
inline double OutputTolerance(DType dtype, bool pairs, int32_t head_dim) {
  if (dtype == DType::kF32) return 3 * 0x1p-24 * 10 * std::sqrt(head_dim);
  if (dtype == DType::kF16) return 2e-3;
  return pairs ? 3e-2 : 1.6e-2;
}

// Largest |lse - reference|: f32 logits up to about 10, sums of up to 1024 terms. A
// backend may keep the means of the mean correction (`corrects`) in the input dtype:
// the logit of a mean key is then off by half an ulp of its terms.
inline double LseTolerance(DType dtype, bool corrects) {
  if (!corrects || dtype == DType::kF32) return 2e-5;
  return dtype == DType::kF16 ? 2e-3 : 1e-2;
}

// The same on a GPU: its exponentials and logarithms in base two are approximations of
// two ulp, and sums are of up to 1,300 terms.
inline double DeviceOutputTolerance(DType dtype, int32_t head_dim) {
  return std::max(OutputTolerance(dtype, /*pairs=*/true, head_dim), 4e-3);
}
inline double DeviceLseTolerance(DType dtype, bool corrects) {
  return std::max(LseTolerance(dtype, corrects), 2e-4);
}

// On a GPU one list row of so many may differ by a near tie of block masses, and one of
// a case with fewer. Outputs are judged over the device's own lists.
inline constexpr int64_t kDeviceRowsPerOtherRow = 100;

// Largest |coverage - reference|: f32 probabilities of up to 1024 keys.
inline constexpr double kCoverageTolerance = 1e-5;

// Relative change of a threshold that covers the rounding of f32 scores: logits up to
// about 10 are off by 1e-6, masses by as much of their value.
inline constexpr float kThresholdSlack = 1e-4f;

// Masses of lines below it are 0 in f32, or lose digits: the smallest normal number of
// up to 64 queries.
inline constexpr double kMassUnderflow = 1e-36;

// Share of the selected blocks of a suite that may lie inside that slack.
inline constexpr double kBlocksInSlackMax = 1e-3;

}  // namespace pbs::testing_support
