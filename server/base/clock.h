// Clock: the source of time for every decision about time, so that tests can control
// it.
//
// Threading: safe from any thread. Memory: none.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "absl/time/time.h"

namespace pbs::server {

class Clock {
 public:
  virtual ~Clock() = default;
  // Never goes back, also when the system's date is changed.
  virtual absl::Time Now() const = 0;

  // Converts `deadline` of the system clock: the result is as far from Now() as
  // `deadline` is from the system's time. The latest representable time (a call without
  // a deadline) gives InfiniteFuture.
  absl::Time FromSystem(std::chrono::system_clock::time_point deadline) const;
};

// The system's date at construction plus the steady clock since.
class RealClock final : public Clock {
 public:
  RealClock();
  absl::Time Now() const override;

 private:
  const absl::Time start_;
  const std::chrono::steady_clock::time_point steady_start_;
};

// Stands still until Advance().
class ManualClock final : public Clock {
 public:
  explicit ManualClock(absl::Time start = absl::FromUnixSeconds(1'700'000'000));
  absl::Time Now() const override;
  // Requires duration >= 0.
  void Advance(absl::Duration duration);

 private:
  std::atomic<int64_t> unix_nanos_;
};

}  // namespace pbs::server
