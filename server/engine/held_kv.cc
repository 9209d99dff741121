#include "server/engine/held_kv.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {

HeldKv::HeldKv(KvCache cache, ByteReservation bytes, CapturedQueries queries,
               std::unique_ptr<SharedRegion> region)
    : region_(std::move(region)),
      cache_(std::move(cache)),
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

absl::Status HeldKv::EndedEarly() const {
  return absl::UnavailableError(absl::StrCat("the prefill of this ticket ended early: ",
                                             absl::StatusCodeToString(status_.code())));
}

absl::Status HeldKv::readable() const {
  MutexLock lock(mutex_);
  if (!closed_.ok()) return closed_;
  return status_.ok() ? absl::OkStatus() : EndedEarly();
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

void HeldKv::Close(absl::Status reason) {
  std::vector<Waiter> ready;
  {
    MutexLock lock(mutex_);
    PBS_CHECK(!reason.ok());
    if (!closed_.ok()) return;
    closed_ = std::move(reason);
    ready = TakeReadyWaiters();
  }
  for (Waiter& waiter : ready) waiter.callback();
}

void HeldKv::Abandon() {
  absl::Status reason;
  {
    MutexLock lock(mutex_);
    reason = EndedEarly();
  }
  Close(std::move(reason));
}

bool HeldKv::IsReady(int32_t layer) const {
  return finished_ || !closed_.ok() || layer < layers_ready_;
}

WaiterId HeldKv::WhenReady(int32_t layer, absl::AnyInvocable<void()> callback) {
  {
    MutexLock lock(mutex_);
    if (!IsReady(layer)) {
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
    (IsReady(waiter.layer) ? ready : waiting).push_back(std::move(waiter));
  }
  waiters_ = std::move(waiting);
  return ready;
}

}  // namespace pbs::server
