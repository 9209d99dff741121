// Keys and values of a run apart from the caches that keep them: a few layers at a
// time, each on its way to the held caches while the next ones run. For a device with
// memory of its own, and for prompts that run as one.
//
// Threading: one thread, but for what Send() calls back. Memory: BytesOf() on the
// backend; for several prompts as much again on the host.
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
  // One layer is written while the one before it leaves.
  static constexpr int32_t kLayers = 2;
  static int64_t BytesOf(const KvShape& shape);

  // Prompts lie back to back, each as long as its cache's capacity. `held` are in
  // ordinary memory, of one model and dtype; they and the backend must outlive the
  // window, a cache only until DropPrompt().
  static absl::StatusOr<std::unique_ptr<KvWindow>> Create(
      std::span<const KvCache* const> held, Backend& backend, const Clock& clock);
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
  // `on_held` is called when it is in the held caches, not when that failed; in order,
  // from another thread.
  void Send(int32_t layer, std::function<void()> on_held);
  // Waits for all layers sent so far.
  absl::Status Wait() { return MakeRoomFor(sent_ + kLayers - 1); }

  // Seconds that copying took so far, layers that failed apart: twice that of the
  // values, which begins when the keys are there and is of as many bytes.
  double copy_seconds() const;
  // Seconds of it that MakeRoomFor() and Wait() waited. Beside these nothing ran but
  // layers that had been called before.
  double wait_seconds() const { return wait_seconds_; }

  // Of several: nothing is written to this one any more. Waits for a copy under way.
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
  // From the staging plane to the rows of every prompt.
  void Scatter(int32_t layer, Plane plane);
  std::byte* StagingPlane(int32_t layer, Plane plane) const;

  KvCache cache_;
  const Buffer staging_;  // of several prompts: where planes arrive
  Backend& backend_;
  const Clock& clock_;
  std::vector<int64_t> rows_;  // of every prompt
  int32_t sent_ = 0;           // layers
  double wait_seconds_ = 0;
  mutable Mutex mutex_;
  CondVar changed_;
  int32_t left_ ABSL_GUARDED_BY(mutex_) = 0;  // layers, held or failed
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Time keys_copied_ ABSL_GUARDED_BY(mutex_);
  absl::Duration copying_ ABSL_GUARDED_BY(mutex_);
  Mutex held_mutex_;  // while a plane is scattered
  std::vector<const KvCache*> held_ ABSL_GUARDED_BY(held_mutex_);  // null: dropped
};

}  // namespace pbs::server
