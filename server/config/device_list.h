// A list of devices: "all", or their numbers, "0,2".
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace pbs::server {

inline constexpr int32_t kDevicesMax = 64;

// The numbers in the order of `text`, each once; empty for "all" and for "".
// InvalidArgument quotes a part that is not a number below kDevicesMax or is repeated.
absl::StatusOr<std::vector<int32_t>> ParseDevices(const std::string& text);

}  // namespace pbs::server
