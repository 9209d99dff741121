// One run of the model on behalf of one prompt, or of several short ones.
//
// Prompts of a group go through every layer together, back to back, so that a layer's
// weights are read and its kernels are launched once for all of them. Each has its own
// cache and hears of its own layers. One that leaves early is computed to the end, but
// nothing of it is kept.
//
// Threading: one thread, but for Prompt::OnHeld(). Memory: the workspace, and a window
// where there are several prompts or device memory is not ordinary memory; allocated at
// the first layer, inside what the group was given, which goes back with the group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/clock.h"
#include "server/base/mutex.h"
#include "server/engine/engine.h"
#include "server/engine/held_kv.h"
#include "server/engine/kv_window.h"
#include "server/model/prefill.h"

namespace pbs::server {

class PrefillGroup final : private PrefillObserver {
 public:
  // Who wants a prompt run. Called by the group's thread, but for OnHeld().
  class Prompt {
   public:
    virtual ~Prompt() = default;
    virtual std::span<const int32_t> tokens() const = 0;
    virtual HeldKv& held() = 0;
    // The layer's keys and values are in held(). From the group's thread or the
    // backend's.
    virtual void OnHeld(int32_t layer) = 0;
    // `is_first` of the group, so that what they share is counted once.
    virtual void OnLayerDone(const LayerReport& report, bool is_first) = 0;
    // ReadLogits() may be called.
    virtual void OnLogits() = 0;
    // All layers are held.
    virtual void OnRunDone(bool is_first) = 0;
  };

  // `plan` is that of the prompts in this order, with the logit rows of the first, then
  // of the second, ...; `charged` covers BytesOfGroup(). Prompts must outlive the group
  // or leave it.
  PrefillGroup(const Model& model, PrefillPlan plan, std::vector<Prompt*> prompts,
               std::vector<JobReservation> charged, const Clock& clock);

  size_t size() const { return num_prompts_; }
  int32_t layers_done() const { return run_ == nullptr ? 0 : run_->layers_finished(); }
  bool done() const { return run_ != nullptr && run_->layers_done(); }
  double embed_seconds() const { return run_->embed_seconds(); }
  // Of KvWindow; 0 without one.
  double copy_seconds() const { return window_ ? window_->copy_seconds() : 0; }
  double copy_wait_seconds() const { return window_ ? window_->wait_seconds() : 0; }

  // The next layer, and after the last one the logits. On a device the layer before may
  // be what ends with it (PrefillRun). After an error the group is over.
  absl::Status RunLayer(const RunControl& control);
  // Waits for what was called, so that another run may use the backend. An error is
  // that of the next RunLayer().
  void SetAside();
  // Of the plan's logit row; waits.
  absl::Status ReadLogits(int32_t row, std::span<float> logits);

  // The prompt hears nothing any more and its cache is not touched again.
  void Leave(Prompt& prompt);

 private:
  absl::Status Begin();
  void OnKvReady(int32_t layer) override;
  void TellHeld(int32_t layer);
  absl::Status Conclude();
  std::vector<Prompt*> LivePrompts();
  void OnLayerDone(const LayerReport& report) override;

  const Model& model_;
  const PrefillPlan plan_;
  const size_t num_prompts_;
  const std::vector<JobReservation> charged_;
  const Clock& clock_;
  Mutex mutex_;
  std::vector<Prompt*> prompts_ ABSL_GUARDED_BY(mutex_);  // null: has left
  Buffer workspace_;
  std::unique_ptr<KvWindow> window_;
  std::unique_ptr<PrefillRun> run_;
  absl::Status set_aside_;
};

// What a run takes beside the prompts' caches; `shared`: by several.
struct GroupBytes {
  int64_t host = 0;
  int64_t device = 0;
};
GroupBytes BytesOfGroup(const Model& model, const PrefillPlan& plan, bool shared);

}  // namespace pbs::server
