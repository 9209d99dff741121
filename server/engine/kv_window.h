// A buffer for keys and values of a few layers of a run. Each layer is copied from it
// to the held caches while the next layers run. It serves devices with memory of their
// own, and prompts that run as one batch.
//
// Threading: one thread; Send()'s callback comes from another one. Memory: BytesOf() on
// the backend; for several prompts as much again on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

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
  // One layer is written while the one before it is copied.
  static constexpr int32_t kLayers = 2;
  static int64_t BytesOf(const KvShape& shape);

  // Prompts are back to back, each as long as its cache's capacity. The caches `held`
  // are in ordinary memory, of one model and dtype. They, until DropPrompt(), and the
  // backend must outlive the window.
  static absl::StatusOr<std::unique_ptr<KvWindow>> Create(
      std::span<const KvCache* const> held, Backend& backend, const Clock& clock);
  // Waits for all layers sent.
  ~KvWindow();
  KvWindow(const KvWindow&) = delete;
  KvWindow& operator=(const KvWindow&) = delete;

  // The cache that the prefill writes.
  KvCache& cache() { return cache_; }

  // Waits until `layer` may be written, which is when the layer before it in the same
  // place was copied. Returns the error of any copy that failed.
  absl::Status MakeRoomFor(int32_t layer);
  // Copies `layer` after the backend calls made so far. Call it in order of layers.
  // `on_held` is called when the layer is in the held caches, in order, from another
  // thread; it is not called when the copy failed.
  void Send(int32_t layer, std::function<void()> on_held);
  // Waits for all layers sent so far.
  absl::Status Wait() { return MakeRoomFor(sent_ + kLayers - 1); }

  // Seconds that copying took so far, without failed layers. It is twice the time of
  // the values' copies, which begin when the keys have arrived and have as many bytes.
  double copy_seconds() const;
  // Seconds that MakeRoomFor() and Wait() waited for copies. During these only layers
  // ran that had been called before.
  double wait_seconds() const { return wait_seconds_; }

  // Stops copying to this one of several prompts. Waits for a copy under way.
  void DropPrompt(size_t prompt);

 private:
  KvWindow(std::span<const KvCache* const> held, KvCache cache, Buffer staging,
           Backend& backend, const Clock& clock)
      : cache_(std::move(cache)),
        staging_(std::move(staging)),
        backend_(backend),
        clock_(clock),
        held_(held.begin(), held.end()) {
    for (const KvCache* prompt : held) rows_.push_back(prompt->shape().capacity);
  }
  enum class Plane : uint8_t { kKeys, kValues };
  void SendPlane(int32_t layer, Plane plane, std::function<void()> on_held);
  void OnCopied(const Status& status, const std::function<void()>& on_held);
  // Copies the staging plane to the rows of every prompt.
  void Scatter(int32_t layer, Plane plane);
  std::byte* StagingPlane(int32_t layer, Plane plane) const;

  KvCache cache_;
  const Buffer staging_;  // for several prompts: receives the planes
  Backend& backend_;
  const Clock& clock_;
  std::vector<int64_t> rows_;  // rows of each prompt
  int32_t sent_ = 0;           // layers
  double wait_seconds_ = 0;
  mutable Mutex mutex_;
  CondVar changed_;
  int32_t left_ ABSL_GUARDED_BY(mutex_) = 0;  // layers copied or failed
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Time keys_copied_ ABSL_GUARDED_BY(mutex_);
  absl::Duration copying_ ABSL_GUARDED_BY(mutex_);
  Mutex held_mutex_;  // held while a plane is scattered
  std::vector<const KvCache*> held_ ABSL_GUARDED_BY(held_mutex_);  // null: dropped
};

}  // namespace pbs::server
