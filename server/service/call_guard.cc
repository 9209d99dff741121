#include "server/service/call_guard.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pbs::server {

CallGuard::CallGuard(TimerQueue& timers, const Clock& clock,
                     std::function<void(absl::Status)> cut)
    : timers_(timers), clock_(clock), state_(std::make_shared<State>()) {
  MutexLock lock(state_->mutex);
  state_->cut = std::move(cut);
}

void CallGuard::Limit(absl::Duration limit, std::string message) {
  MutexLock lock(state_->mutex);
  state_->limit_timer =
      timers_.At(clock_.Now() + limit, [state = state_, message = std::move(message)] {
        // Under the lock, so that the call cannot end while it is being cut.
        MutexLock timer_lock(state->mutex);
        if (state->limit_timer == 0) return;  // met just now
        if (auto cut = std::exchange(state->cut, nullptr)) {
          cut(absl::DeadlineExceededError(message));
        }
      });
}

void CallGuard::Met() {
  MutexLock lock(state_->mutex);
  timers_.Cancel(std::exchange(state_->limit_timer, 0));
}

void CallGuard::Watch(std::function<uint64_t()> ticks, absl::Duration limit) {
  const uint64_t seen = ticks();
  ScheduleLook(state_, {timers_, clock_, std::move(ticks), limit, seen});
}

void CallGuard::ScheduleLook(std::shared_ptr<State> state, const Watched& watched) {
  MutexLock lock(state->mutex);
  if (state->cut == nullptr) return;
  state->watch_timer = watched.timers.At(watched.clock.Now() + watched.limit,
                                         [state, watched] { Look(state, watched); });
}

void CallGuard::Look(const std::shared_ptr<State>& state, Watched watched) {
  {
    MutexLock lock(state->mutex);
    if (state->cut == nullptr) return;
    const uint64_t ticks = watched.ticks();
    if (ticks == watched.seen && ticks % 2 == 1) {
      std::exchange(state->cut, nullptr)(absl::CancelledError(
          absl::StrCat("the reader took nothing for write_stall_seconds_max ",
                       absl::ToInt64Seconds(watched.limit), " seconds")));
      return;
    }
    watched.seen = ticks;
  }
  ScheduleLook(state, watched);
}

void CallGuard::Disarm() {
  MutexLock lock(state_->mutex);
  state_->cut = nullptr;
  timers_.Cancel(std::exchange(state_->limit_timer, 0));
  timers_.Cancel(std::exchange(state_->watch_timer, 0));
}

}  // namespace pbs::server
