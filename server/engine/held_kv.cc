#include "server/engine/held_kv.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "pbs/check.h"

namespace pbs::server {

HeldKv::HeldKv(KvCache cache, ByteReservation bytes, CapturedQueries queries)
    : cache_(std::move(cache)),
      queries_(std::move(queries)),
      bytes_(std::move(bytes)) {}

int32_t HeldKv::layers_ready() const {
  MutexLock lock(mutex_);
  return layers_ready_;
}

bool HeldKv::finished() const {
  MutexLock lock(mutex_);
  return finished_;
}

absl::Status HeldKv::status() const {
  MutexLock lock(mutex_);
  return status_;
}

void HeldKv::Publish(int32_t layers) {
  std::vector<Waiter> ready;
  {
    MutexLock lock(mutex_);
    PBS_CHECK(!finished_ && layers >= layers_ready_);
    layers_ready_ = layers;
    ready = TakeReadyWaiters();
  }
  for (Waiter& waiter : ready) waiter.callback();
}

void HeldKv::Finish(absl::Status status) {
  std::vector<Waiter> ready;
  {
    MutexLock lock(mutex_);
    PBS_CHECK(!finished_);
    finished_ = true;
    status_ = std::move(status);
    ready = TakeReadyWaiters();
  }
  for (Waiter& waiter : ready) waiter.callback();
}

WaiterId HeldKv::WhenReady(int32_t layer, absl::AnyInvocable<void()> callback) {
  {
    MutexLock lock(mutex_);
    if (!finished_ && layer >= layers_ready_) {
      waiters_.push_back({++last_waiter_, layer, std::move(callback)});
      return last_waiter_;
    }
  }
  callback();
  return 0;
}

bool HeldKv::CancelWait(WaiterId id) {
  Waiter cancelled;  // destroyed after the lock is released
  MutexLock lock(mutex_);
  const auto found =
      std::find_if(waiters_.begin(), waiters_.end(),
                   [id](const Waiter& waiter) { return waiter.id == id; });
  if (found == waiters_.end()) return false;
  cancelled = std::move(*found);
  waiters_.erase(found);
  return true;
}

// In the order in which they came.
std::vector<HeldKv::Waiter> HeldKv::TakeReadyWaiters() {
  std::vector<Waiter> ready;
  std::vector<Waiter> waiting;
  for (Waiter& waiter : waiters_) {
    const bool is_ready = finished_ || waiter.layer < layers_ready_;
    (is_ready ? ready : waiting).push_back(std::move(waiter));
  }
  waiters_ = std::move(waiting);
  return ready;
}

}  // namespace pbs::server
