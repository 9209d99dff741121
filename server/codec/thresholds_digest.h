// A digest of the thresholds of query heads, for sparsity digests.
//
// Threading: pure functions.
#pragma once

#include <span>
#include <string>

namespace pbs::server {

// True when there is one threshold and no other.
bool AreEqual(std::span<const float> thresholds);

// 64 hex digits; equal thresholds give equal digests in every build.
std::string ThresholdsDigest(std::span<const float> thresholds);

}  // namespace pbs::server
