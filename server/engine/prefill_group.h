// One run of the model for one prompt, or for several short ones.
//
// Prompts of a group go through every layer together, back to back, so that a layer's
// weights are read and its kernels are launched once for all of them. Each prompt has
// its own cache and its own callbacks. A prompt that leaves early is still computed to
// the end, but its results are dropped.
//
// Threading: one thread, except Prompt::OnHeld(). Memory: the workspace, and a KvWindow
// where there are several prompts or device memory is not ordinary memory. Both are
// allocated at the first layer, within `charged`, which the group returns when
// destroyed.
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
  // The callbacks of one prompt. The group's thread calls them, except OnHeld().
  class Prompt {
   public:
    virtual ~Prompt() = default;
    virtual std::span<const int32_t> tokens() const = 0;
    virtual HeldKv& held() = 0;
    // The layer's keys and values are in held(). Called from the group's thread or the
    // backend's.
    virtual void OnHeld(int32_t layer) = 0;
    // `is_first` is true for the first prompt of the group, so that shared work is
    // counted once.
    virtual void OnLayerDone(const LayerReport& report, bool is_first) = 0;
    // ReadLogits() may be called.
    virtual void OnLogits() = 0;
    // All layers are held.
    virtual void OnRunDone(bool is_first) = 0;
  };

  // `plan` is the plan of the prompts in this order; its logit rows are those of the
  // first prompt, then of the second, and so on. `charged` covers BytesOfGroup().
  // Prompts must outlive the group or leave it.
  PrefillGroup(const Model& model, PrefillPlan plan, std::vector<Prompt*> prompts,
               std::vector<JobReservation> charged, const Clock& clock);

  size_t size() const { return num_prompts_; }
  int32_t layers_done() const { return run_ == nullptr ? 0 : run_->layers_finished(); }
  bool done() const { return run_ != nullptr && run_->layers_done(); }
  double embed_seconds() const { return run_->embed_seconds(); }
  // KvWindow::copy_seconds(); 0 without a window.
  double copy_seconds() const { return window_ ? window_->copy_seconds() : 0; }
  double copy_wait_seconds() const { return window_ ? window_->wait_seconds() : 0; }

  // Runs the next layer, and after the last layer the logits. On a device the call may
  // finish the layer before it instead (PrefillRun). After an error only destroy the
  // group.
  absl::Status RunLayer(const RunControl& control);
  // Waits for all called work, so that another run may use the backend. The next
  // RunLayer() returns its error.
  void SetAside();
  // Waits for the logits of the plan's logit row `row` and copies them.
  absl::Status ReadLogits(int32_t row, std::span<float> logits);

  // Ends the prompt's callbacks. Its cache is not written afterwards.
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
  std::vector<Prompt*> prompts_ ABSL_GUARDED_BY(mutex_);  // null: it has left
  Buffer workspace_;
  std::unique_ptr<KvWindow> window_;
  std::unique_ptr<PrefillRun> run_;
  absl::Status set_aside_;
};

// Memory that a run takes beside the prompts' caches; `shared`: several prompts share
// it.
struct GroupBytes {
  int64_t host = 0;
  int64_t device = 0;
};
GroupBytes BytesOfGroup(const Model& model, const PrefillPlan& plan, bool shared);

}  // namespace pbs::server
