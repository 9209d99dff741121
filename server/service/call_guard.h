// Time limits of one call: timers that cut the call unless it ends before.
//
// Threading: safe from any thread. Memory: one small block that the last timer frees.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/base/mutex.h"
#include "server/base/timers.h"
#include "server/service/write_loop.h"

namespace pbs::server {

class CallGuard {
 public:
  // `cut(reason)` ends the call: CANCELLED for a stalled write, DEADLINE_EXCEEDED for a
  // time limit. It is called on the timer thread, at most once, and
  // never after Disarm() has returned. It must not call the guard.
  CallGuard(TimerQueue& timers, const Clock& clock,
            std::function<void(absl::Status)> cut);
  ~CallGuard() { Disarm(); }
  CallGuard(const CallGuard&) = delete;
  CallGuard& operator=(const CallGuard&) = delete;

  // Cuts the call with DEADLINE_EXCEEDED and `message` after `limit`, unless Met() is
  // called before. One limit at a time.
  void Limit(absl::Duration limit, std::string message);
  void Met();

  // Cuts the call with CANCELLED when one write stays in flight for `limit`. It checks
  // once per `limit`, so that it costs nothing per message.
  void WatchWrites(const WriteLoop& loop, absl::Duration limit) {
    Watch([&loop] { return loop.ticks(); }, limit);
  }
  // The same for anything that counts as WriteLoop::ticks(). `ticks` is called until
  // Disarm() has returned.
  void Watch(std::function<uint64_t()> ticks, absl::Duration limit);

  void Disarm();

 private:
  struct State {
    Mutex mutex;
    std::function<void(absl::Status)> cut ABSL_GUARDED_BY(mutex);  // null: disarmed
    TimerId limit_timer ABSL_GUARDED_BY(mutex) = 0;
    TimerId watch_timer ABSL_GUARDED_BY(mutex) = 0;
  };
  // State of the check of writes.
  struct Watched {
    TimerQueue& timers;
    const Clock& clock;
    std::function<uint64_t()> ticks;
    absl::Duration limit;
    uint64_t seen;  // ticks at the last check
  };
  static void ScheduleLook(std::shared_ptr<State> state, const Watched& watched);
  static void Look(const std::shared_ptr<State>& state, Watched watched);

  TimerQueue& timers_;
  const Clock& clock_;
  // Shared with the timers, because one may run while the call ends.
  const std::shared_ptr<State> state_;
};

}  // namespace pbs::server
