// Keys and values of a prefill on a device with memory of its own: a few layers at a
// time, each on its way to the held cache while the next ones run.
//
// Threading: one thread, but for what Send() calls back. Memory: BytesOf() on the
// device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pbs/attention.h"
#include "pbs/backend.h"
#include "server/base/clock.h"
#include "server/base/mutex.h"
#include "server/model/kv_cache.h"

namespace pbs::server {

class KvWindow {
 public:
  // One layer is written while the one before it leaves.
  static constexpr int32_t kLayers = 2;
  static int64_t BytesOf(const KvShape& shape);

  // `held` is ordinary memory. All must outlive the window.
  static absl::StatusOr<std::unique_ptr<KvWindow>> Create(const KvCache& held,
                                                          Backend& backend,
                                                          const Clock& clock);
  // Waits for what was sent.
  ~KvWindow();
  KvWindow(const KvWindow&) = delete;
  KvWindow& operator=(const KvWindow&) = delete;

  // To run the prefill on.
  KvCache& cache() { return cache_; }

  // Waits until `layer` may be written: the one whose place it takes has left. The
  // error of any layer that did not.
  absl::Status MakeRoomFor(int32_t layer);
  // Copies what the backend was told to put into `layer`; layers come in order.
  // `on_held` is called when it is in the held cache, not when that failed; in order,
  // from another thread.
  void Send(int32_t layer, std::function<void()> on_held);
  // Waits for all layers sent so far.
  absl::Status Wait() { return MakeRoomFor(sent_ + kLayers - 1); }

  // Seconds that copying took so far, layers that failed apart: twice that of the
  // values, which begins when the keys are there and is of as many bytes.
  double copy_seconds() const;
  // Seconds of it that MakeRoomFor() and Wait() waited: nothing ran beside these.
  double wait_seconds() const { return wait_seconds_; }

 private:
  KvWindow(const KvCache& held, KvCache cache, Backend& backend, const Clock& clock)
      : held_(held), cache_(std::move(cache)), backend_(backend), clock_(clock) {}
  void OnCopied(const Status& status, const std::function<void()>* on_held);

  const KvCache& held_;
  KvCache cache_;
  Backend& backend_;
  const Clock& clock_;
  int32_t sent_ = 0;  // layers
  double wait_seconds_ = 0;
  mutable Mutex mutex_;
  CondVar changed_;
  int32_t left_ ABSL_GUARDED_BY(mutex_) = 0;  // layers, held or failed
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Time keys_copied_ ABSL_GUARDED_BY(mutex_);
  absl::Duration copying_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
