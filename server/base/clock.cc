#include "server/base/clock.h"
#include <chrono>

#include "absl/time/clock.h"
#include "pbs/check.h"

namespace pbs::server {

absl::Time Clock::FromSystem(std::chrono::system_clock::time_point deadline) const {
  using SystemClock = std::chrono::system_clock;
  if (deadline == SystemClock::time_point::max()) return absl::InfiniteFuture();
  return Now() + (absl::FromChrono(deadline) - absl::FromChrono(SystemClock::now()));
}

RealClock::RealClock()
    : start_(absl::Now()), steady_start_(std::chrono::steady_clock::now()) {}

absl::Time RealClock::Now() const {
  return start_ + absl::FromChrono(std::chrono::steady_clock::now() - steady_start_);
}

ManualClock::ManualClock(absl::Time start) : unix_nanos_(absl::ToUnixNanos(start)) {}

absl::Time ManualClock::Now() const { return absl::FromUnixNanos(unix_nanos_.load()); }

void ManualClock::Advance(absl::Duration duration) {
  PBS_CHECK(duration >= absl::ZeroDuration());
  unix_nanos_.fetch_add(absl::ToInt64Nanoseconds(duration));
}

}  // namespace pbs::server
