#include "client/cpp/bench/cpu_clock.h"

#include <ctime>
#include <optional>

namespace pbs::bench {

std::optional<double> CpuSeconds(pid_t pid) {
  clockid_t clock;
  timespec now{};
  if (pid <= 0 || clock_getcpuclockid(pid, &clock) != 0 ||
      clock_gettime(clock, &now) != 0) {
    return std::nullopt;
  }
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace pbs::bench
