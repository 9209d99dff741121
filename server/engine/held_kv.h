// A KV cache that one prefill fills while any number of readers read it, and the
// queries that the prefill was asked to capture.
//
// The executor writes layer after layer and publishes each. Readers read published
// layers only, so tensor memory needs no lock. Ownership is shared (std::shared_ptr):
// the running job, the lease and every reader own it; the last owner frees it. Readers
// stop when the prefill fails and when the owner of the lease closes the cache.
//
// Threading: one writer; readers from any thread. Callbacks run on the thread that
// publishes or closes, without a lock held, and must not block.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "server/base/mutex.h"
#include "server/base/shared_region.h"
#include "server/engine/byte_ledger.h"
#include "server/model/captured_queries.h"
#include "server/model/kv_cache.h"

namespace pbs::server {

using WaiterId = uint64_t;

inline constexpr int32_t kNoLayer = std::numeric_limits<int32_t>::max();

class HeldKv {
 public:
  // `bytes` is the charge for cache and queries, which this object returns to the
  // ledger when destroyed.
  // `region` is the memory of the cache where that is shared, else null.
  HeldKv(KvCache cache, ByteReservation bytes, CapturedQueries queries = {},
         std::unique_ptr<SharedRegion> region = nullptr);

  const KvCache& cache() const { return cache_; }
  KvCache& writable_cache() { return cache_; }  // the executor only
  // Those of a layer are complete when the layer is ready.
  const CapturedQueries& queries() const { return queries_; }
  CapturedQueries& writable_queries() { return queries_; }  // the executor only

  const SharedRegion* region() const { return region_.get(); }

  int32_t layers_ready() const;
  bool finished() const;
  absl::Status status() const;  // of the prefill; OK while it runs
  // OK while readers may read. Else why not: the reason of Close(), or Unavailable with
  // the code of the prefill that failed.
  absl::Status readable() const;

  // Writer: layers [0, layers) are complete.
  void Publish(int32_t layers);
  // Writer: no more layers will come. OK only after the last one was published.
  void Finish(absl::Status status);

  // Ends all reading, now and later, for `reason`, which is not OK. The first reason
  // counts.
  void Close(absl::Status reason);
  // As Close(), with the reason of a prefill that ended before it was complete.
  void Abandon();

  // Calls `callback` once, as soon as layer `layer` is ready, the prefill has finished
  // or the cache is closed; check readable(). When that is already the case it calls
  // `callback` at once and returns 0. Callbacks that wait when this is destroyed are
  // not called. kNoLayer is never ready.
  WaiterId WhenReady(int32_t layer, absl::AnyInvocable<void()> callback);

  // True when the callback will never run because of this call; false when it has run,
  // is running or is unknown (0 is). A reader that ends must cancel its wait, because
  // any number of readers may come and end during one prefill.
  bool CancelWait(WaiterId id);

 private:
  struct Waiter {
    WaiterId id;
    int32_t layer;
    absl::AnyInvocable<void()> callback;
  };
  bool IsReady(int32_t layer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status EndedEarly() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<Waiter> TakeReadyWaiters() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::unique_ptr<SharedRegion> region_;
  KvCache cache_;
  CapturedQueries queries_;
  ByteReservation bytes_;
  mutable Mutex mutex_;
  int32_t layers_ready_ ABSL_GUARDED_BY(mutex_) = 0;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Status closed_ ABSL_GUARDED_BY(mutex_);  // OK: open
  WaiterId last_waiter_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Waiter> waiters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
