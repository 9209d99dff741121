// Times a transfer and sums up samples.
//
// Threading: one thread; Measure() starts one per stream and joins them.
#pragma once

#include <sys/types.h>

#include <functional>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/bench/transfer.h"

namespace pbs::bench {

struct Sample {
  double seconds = 0;  // from the start of the first stream to the end of the last
  double client_cpu_seconds = 0;
  std::optional<double> peer_cpu_seconds;  // nullopt when the peer's process is unknown
};

// Prepares, times and checks one transfer. `peer` is the process it talks to, or 0.
absl::StatusOr<Sample> Measure(Transfer& transfer, pid_t peer);

struct Spread {
  double median = 0, min = 0, max = 0;
};

// Requires at least one value.
Spread SpreadOf(std::vector<double> values);

}  // namespace pbs::bench
