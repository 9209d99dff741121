// Counts the open calls, so that a shutdown can end with the last of them. gRPC's own
// shutdown also waits for idle connections, whose peers may take seconds to react.
//
// Threading: safe from any thread. Memory: none.
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/base/mutex.h"

namespace pbs::server {

class OpenCalls {
 public:
  // Counts one call from its construction to its destruction.
  class Call {
   public:
    explicit Call(OpenCalls& calls) : calls_(calls) { calls_.Add(1); }
    ~Call() { calls_.Add(-1); }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    OpenCalls& calls_;
  };

  // Number of calls that were ever open.
  int64_t begun() {
    MutexLock lock(mutex_);
    return begun_;
  }
  bool none() {
    MutexLock lock(mutex_);
    return open_ == 0;
  }

  // Returns once no call is open, or after `limit`.
  void WaitForNone(absl::Duration limit) {
    const absl::Time until = absl::Now() + limit;
    MutexLock lock(mutex_);
    while (open_ > 0 && absl::Now() < until) {
      changed_.WaitFor(mutex_, absl::ToDoubleSeconds(until - absl::Now()));
    }
  }

 private:
  void Add(int32_t count) {
    MutexLock lock(mutex_);
    open_ += count;
    begun_ += std::max(count, 0);
    if (open_ == 0) changed_.NotifyAll();
  }

  Mutex mutex_;
  CondVar changed_;
  int32_t open_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t begun_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pbs::server
