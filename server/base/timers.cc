#include "server/base/timers.h"

#include <algorithm>
#include <utility>

namespace pbs::server {
namespace {

// A longer wait is cut into pieces, so that any Duration fits the wait's argument.
constexpr double kWaitSecondsMax = 3600;

}  // namespace

TimerId TimerQueue::At(absl::Time when, absl::AnyInvocable<void()> callback) {
  if (when == absl::InfiniteFuture()) return 0;
  MutexLock lock(mutex_);
  const TimerId id = ++last_id_;
  const auto entry = pending_.emplace(Key{when, id}, std::move(callback)).first;
  times_.emplace(id, when);
  if (entry == pending_.begin()) changed_.NotifyAll();
  return id;
}

bool TimerQueue::Cancel(TimerId id) {
  absl::AnyInvocable<void()> dropped;  // destroyed after the lock is released
  MutexLock lock(mutex_);
  const auto time = times_.find(id);
  if (time == times_.end()) return false;
  const auto entry = pending_.find(Key{time->second, id});
  dropped = std::move(entry->second);
  pending_.erase(entry);
  times_.erase(time);
  return true;
}

int TimerQueue::RunDue() {
  int num_run = 0;
  while (absl::AnyInvocable<void()> callback = TakeDue()) {
    callback();
    ++num_run;
  }
  return num_run;
}

absl::Time TimerQueue::NextTime() const {
  MutexLock lock(mutex_);
  return pending_.empty() ? absl::InfiniteFuture() : pending_.begin()->first.first;
}

absl::AnyInvocable<void()> TimerQueue::TakeDue() {
  const absl::Time now = clock_.Now();
  MutexLock lock(mutex_);
  if (pending_.empty() || pending_.begin()->first.first > now) return nullptr;
  const auto entry = pending_.begin();
  absl::AnyInvocable<void()> callback = std::move(entry->second);
  times_.erase(entry->first.second);
  pending_.erase(entry);
  return callback;
}

bool TimerQueue::WaitForDue() {
  MutexLock lock(mutex_);
  while (!stopped_) {
    if (pending_.empty()) {
      changed_.Wait(mutex_);
      continue;
    }
    const double seconds =
        absl::ToDoubleSeconds(pending_.begin()->first.first - clock_.Now());
    if (seconds <= 0) return true;
    changed_.WaitFor(mutex_, std::min(seconds, kWaitSecondsMax));
  }
  return false;
}

void TimerQueue::StopWaiting() {
  MutexLock lock(mutex_);
  stopped_ = true;
  changed_.NotifyAll();
}

TimerThread::TimerThread(TimerQueue& queue)
    : queue_(queue), thread_([this] {
        while (queue_.WaitForDue()) queue_.RunDue();
      }) {}

TimerThread::~TimerThread() {
  queue_.StopWaiting();
  thread_.join();
}

}  // namespace pbs::server
