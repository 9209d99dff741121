#include "client/cpp/bench/measure.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <latch>
#include <optional>
#include <thread>
#include <vector>

#include "client/cpp/bench/cpu_clock.h"

namespace pbs::bench {
namespace {

using Clock = std::chrono::steady_clock;

}  // namespace

absl::StatusOr<Sample> Measure(Transfer& transfer, pid_t peer) {
  const int32_t streams = transfer.label().streams;
  std::vector<absl::Status> ends(static_cast<size_t>(streams));
  transfer.Prepare();

  std::latch ready(streams + 1);
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < streams; ++i) {
    threads.emplace_back([&, i] {
      ready.arrive_and_wait();
      ends[i] = transfer.Run(i);
    });
  }
  const pid_t own = transfer.client_pid() != 0 ? transfer.client_pid() : getpid();
  const std::optional<double> own_before = CpuSeconds(own);
  const std::optional<double> peer_before = CpuSeconds(peer);
  const Clock::time_point begin = Clock::now();
  ready.arrive_and_wait();
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> elapsed = Clock::now() - begin;
  const std::optional<double> own_after = CpuSeconds(own);
  const std::optional<double> peer_after = CpuSeconds(peer);

  for (const absl::Status& end : ends) {
    if (!end.ok()) return end;
  }
  if (absl::Status right = transfer.Check(); !right.ok()) return right;
  Sample sample;
  sample.seconds = elapsed.count();
  sample.client_cpu_seconds = own_after.value_or(0) - own_before.value_or(0);
  if (peer_before.has_value() && peer_after.has_value()) {
    sample.peer_cpu_seconds = *peer_after - *peer_before;
  }
  return sample;
}

Spread SpreadOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  const double median = values.size() % 2 == 1
                            ? values[middle]
                            : (values[middle - 1] + values[middle]) / 2;
  return {.median = median, .min = values.front(), .max = values.back()};
}

}  // namespace pbs::bench
