// The thresholds that a request may be lowered to, so that it meets its deadline, and
// by which the cost model keeps measurements apart.
//
// Threading: pure functions.
#pragma once

#include <array>

#include "absl/functional/function_ref.h"

namespace pbs::server {

inline constexpr std::array kThresholdLadder = {
    1.0f, 0.98f, 0.95f, 0.9f, 0.85f, 0.8f, 0.7f, 0.6f, 0.5f, 0.4f, 0.3f, 0.2f, 0.1f};

// The lowest rung of the ladder that is at least `threshold`, (0, 1].
float RungOf(float threshold);

// `asked` if it fits; else the highest rung of [lowest, asked) that fits; else
// `lowest`. `fits` is called with falling thresholds. Requires lowest <= asked.
float HighestThatFits(float asked, float lowest, absl::FunctionRef<bool(float)> fits);

}  // namespace pbs::server
