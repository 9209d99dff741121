// A KV cache that one prefill fills while any number of readers read it, and the
// queries that the prefill was asked to capture.
//
// The executor writes layer after layer and publishes each. Readers read published
// layers only, so tensor memory needs no lock. Ownership is shared (std::shared_ptr):
// the running job, the lease and every open fetch own it; the last owner frees it.
//
// Threading: one writer; readers from any thread. Callbacks run on the thread that
// publishes, without a lock held, and must not block.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "server/base/mutex.h"
#include "server/engine/byte_ledger.h"
#include "server/model/captured_queries.h"
#include "server/model/kv_cache.h"

namespace pbs::server {

using WaiterId = uint64_t;

class HeldKv {
 public:
  // `bytes` is the charge for cache and queries, which this object returns to the
  // ledger when destroyed.
  HeldKv(KvCache cache, ByteReservation bytes, CapturedQueries queries = {});

  const KvCache& cache() const { return cache_; }
  KvCache& writable_cache() { return cache_; }  // the executor only
  // Those of a layer are complete when the layer is ready.
  const CapturedQueries& queries() const { return queries_; }
  CapturedQueries& writable_queries() { return queries_; }  // the executor only

  int32_t layers_ready() const;
  bool finished() const;
  absl::Status status() const;  // of the prefill; OK while it runs

  // Writer: layers [0, layers) are complete.
  void Publish(int32_t layers);
  // Writer: no more layers will come. OK only after the last one was published.
  void Finish(absl::Status status);

  // Calls `callback` once, as soon as layer `layer` is ready or the prefill has
  // finished. A failed prefill may finish without that layer: check status(). When that
  // is already the case it calls `callback` at once and returns 0. Callbacks that wait
  // when this is destroyed are not called.
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
  std::vector<Waiter> TakeReadyWaiters() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  KvCache cache_;
  CapturedQueries queries_;
  ByteReservation bytes_;
  mutable Mutex mutex_;
  int32_t layers_ready_ ABSL_GUARDED_BY(mutex_) = 0;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  WaiterId last_waiter_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<Waiter> waiters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
