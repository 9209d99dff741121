// Limits of requests that are part of the protocol rather than of the configuration.
#pragma once

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pbs::server {

inline constexpr size_t kRequestTextBytesMax = 128;  // request_id, keys, salts
inline constexpr int32_t kTopLogitsMax = 100;
inline constexpr int32_t kLogitPositionsMax = 256;
inline constexpr int32_t kPriorityMax = 100;  // and its negative
inline constexpr int32_t kWarmupMax = 100;
inline constexpr int32_t kRepetitionsMax = 1000;

// OK when low <= value <= high.
inline absl::Status CheckRange(absl::string_view field, int64_t value, int64_t low,
                               int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " ", value, " is outside [", low, ", ", high, "]"));
}

inline absl::Status CheckText(absl::string_view field, size_t bytes) {
  if (bytes <= kRequestTextBytesMax) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", bytes, " bytes, more than ", kRequestTextBytesMax));
}

}  // namespace pbs::server
