// Timers: callbacks at moments of a Clock, cancellable.
//
// TimerQueue holds the timers and runs due ones in RunDue(). In a server TimerThread
// calls it; a test advances its ManualClock and calls RunDue() itself.
//
// Threading: safe from any thread. Callbacks run on the thread that runs the queue, one
// at a time, without a lock held; they may add and cancel timers and must not block.
// Memory: one entry per pending timer. The queue has no bound of its own: every owner
// of a timer is bounded (a lease, an upload, a queued job).
#pragma once

#include <cstdint>
#include <map>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/base/mutex.h"

namespace pbs::server {

using TimerId = uint64_t;

class TimerQueue {
 public:
  explicit TimerQueue(const Clock& clock) : clock_(clock) {}

  // Calls `callback` once, not before `when`. Returns an id for Cancel(), never 0.
  // InfiniteFuture drops the callback and returns 0.
  TimerId At(absl::Time when, absl::AnyInvocable<void()> callback);

  // True when the callback will never run because of this call; false when it has run,
  // is running or is unknown (0 is). Never waits for a running callback.
  bool Cancel(TimerId id);

  // Runs the timers that are due now, earliest first and, at equal times, in the order
  // of At(). Returns how many callbacks ran. One thread at a time.
  int RunDue();

  // Moment of the earliest pending timer; InfiniteFuture without one.
  absl::Time NextTime() const;

 private:
  friend class TimerThread;
  using Key = std::pair<absl::Time, TimerId>;

  absl::AnyInvocable<void()> TakeDue();
  // Waits until a timer is due and returns true, or until StopWaiting() and returns
  // false.
  bool WaitForDue();
  void StopWaiting();

  const Clock& clock_;
  mutable Mutex mutex_;
  CondVar changed_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  TimerId last_id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<Key, absl::AnyInvocable<void()>> pending_ ABSL_GUARDED_BY(mutex_);
  std::unordered_map<TimerId, absl::Time> times_ ABSL_GUARDED_BY(mutex_);
};

// Runs a queue from one thread until destroyed. Timers that are pending then stay in
// the queue and are not called. It needs a clock that advances by itself.
class TimerThread {
 public:
  explicit TimerThread(TimerQueue& queue);
  ~TimerThread();
  TimerThread(const TimerThread&) = delete;
  TimerThread& operator=(const TimerThread&) = delete;

 private:
  TimerQueue& queue_;
  std::thread thread_;
};

}  // namespace pbs::server
