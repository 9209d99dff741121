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
#include "pbs/attention.h"
#include "pbs/backend.h"
#include "server/base/mutex.h"
#include "server/model/kv_cache.h"

namespace pbs::server {

class KvWindow {
 public:
  // One layer is written while the one before it leaves.
  static constexpr int32_t kLayers = 2;
  static int64_t BytesOf(const KvShape& shape);

  // `held` is ordinary memory. Both must outlive the window.
  static absl::StatusOr<std::unique_ptr<KvWindow>> Create(const KvCache& held,
                                                          Backend& backend);
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

 private:
  KvWindow(const KvCache& held, KvCache cache, Backend& backend)
      : held_(held), cache_(std::move(cache)), backend_(backend) {}
  void OnCopied(const Status& status, const std::function<void()>* on_held);

  const KvCache& held_;
  KvCache cache_;
  Backend& backend_;
  int32_t sent_ = 0;  // layers
  Mutex mutex_;
  CondVar changed_;
  int32_t left_ ABSL_GUARDED_BY(mutex_) = 0;  // layers, held or failed
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
