// Clock: where every decision about time gets its time, so that it replays in a test.
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
  // Never goes back, whatever happens to the system's date.
  virtual absl::Time Now() const = 0;

  // The moment as far ahead of Now() as `deadline` is ahead of the system clock. The
  // latest representable time (a call without a deadline) is InfiniteFuture.
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

// Stands still until told otherwise.
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
