#include "client/cpp/bench/options.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"

namespace pbs::bench {
namespace {

absl::Status CheckRange(const char* flag, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(flag, " ", value, " is outside [", low, ", ", high, "]"));
}

}  // namespace

absl::Status Validate(const BenchOptions& options) {
  constexpr int32_t kMibMax = 4096, kRoundsMax = 1000;
  constexpr int64_t kPidMax = std::numeric_limits<int32_t>::max();
  if (options.streams.empty()) {
    return absl::InvalidArgumentError("--streams is empty");
  }
  for (const absl::Status& status :
       {CheckRange("--server-pid", options.server_pid, 0, kPidMax),
        CheckRange("--mib", options.mib, 1, kMibMax),
        CheckRange("--rounds", options.rounds, 1, kRoundsMax),
        CheckRange("--chunk-bytes", options.chunk_bytes, 64 << 10, 4 << 20),
        CheckRange("--stream-window-bytes", options.stream_window_bytes, 64 << 10,
                   64 << 20)}) {
    if (!status.ok()) return status;
  }
  if (options.compares("flight") == options.flight.empty()) {
    return absl::InvalidArgumentError(options.flight.empty()
                                          ? "--peers flight needs --flight COMMAND"
                                          : "--flight needs --peers with flight in it");
  }
  if (options.compares("none") && options.peers.size() > 1) {
    return absl::InvalidArgumentError("--peers none is beside others");
  }
  for (auto at = options.streams.begin(); at != options.streams.end(); ++at) {
    if (absl::Status status = CheckRange("--streams", *at, 1, kStreamsMax);
        !status.ok()) {
      return status;
    }
    if (std::find(options.streams.begin(), at, *at) != at) {
      return absl::InvalidArgumentError(
          absl::StrCat("--streams ", *at, " is given more than once"));
    }
  }
  return absl::OkStatus();
}

}  // namespace pbs::bench
