// KvWait: one callback of a HeldKv into a call, which the call can take back before it
// ends.
//
// Threading: pending() and Stop() one at a time, by the call; Start() not beside them,
// except for the first one. The callback runs on the thread that publishes, finishes or
// closes the cache.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "server/base/mutex.h"
#include "server/engine/held_kv.h"

namespace pbs::server {

class KvWait {
 public:
  // `on_ready` runs with a lock held: it must not block or call back.
  explicit KvWait(std::function<void()> on_ready) : on_ready_(std::move(on_ready)) {}

  // Waits for `layer`, as HeldKv::WhenReady(). Not while pending().
  void Start(std::shared_ptr<HeldKv> kv, int32_t layer) {
    {
      MutexLock lock(mutex_);
      pending_ = true;
      id_ = 0;
      kv_ = kv;
    }
    // May call back before it returns. The lock covers on_ready_(): the call may end as
    // soon as it is released.
    const WaiterId id = kv->WhenReady(layer, [this] {
      MutexLock lock(mutex_);
      pending_ = false;
      on_ready_();
    });
    MutexLock lock(mutex_);
    id_ = id;
  }

  bool pending() const {
    MutexLock lock(mutex_);
    return pending_;
  }

  // True: `on_ready` will not run any more. False: it will, and the call must not end
  // before.
  bool Stop() {
    std::shared_ptr<HeldKv> kv;
    WaiterId id;
    {
      MutexLock lock(mutex_);
      if (!pending_) return true;
      kv = kv_;
      id = id_;
    }
    const bool cancelled = kv->CancelWait(id);
    MutexLock lock(mutex_);
    if (cancelled) pending_ = false;
    return !pending_;
  }

 private:
  const std::function<void()> on_ready_;
  mutable Mutex mutex_;
  std::shared_ptr<HeldKv> kv_ ABSL_GUARDED_BY(mutex_);
  WaiterId id_ ABSL_GUARDED_BY(mutex_) = 0;
  bool pending_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace pbs::server
