// A prefill, one layer at a time: tokens in, keys and values and a few logits out.
//
//   PlanPrefill -> KvCache::Create -> Allocate(plan.workspace_bytes)
//     -> PrefillRun::Start -> RunLayer x num_layers -> ComputeLogits -> ReadLogits
//
// Between layers the whole state is the workspace and the cache, so a run may be set
// aside there and taken up again (CatchUp()). A run over `past_len` cached tokens
// continues them: that is how prefixes are reused and how decoding works (decode.h).
//
// Several short prompts may run as one, back to back in the run's rows and in the
// cache: every one is a sequence of its own to attention and starts at position 0.
//
// The last layer's output projection and MLP run on the rows whose logits are wanted
// only: nothing else reads the others.
//
// On a device with memory of its own the host is one layer ahead, so that the device
// never waits for it: RunLayer() calls all of a layer, then waits for the layer before
// and tells of that one; the last call waits for both. What goes wrong in a layer on
// such a device is therefore answered one call later, when the next layer's keys and
// values may have been told of already. Where device memory is ordinary memory a call
// is about its own layer.
//
// Threading: one caller at a time, as the backend. Memory: the workspace and the cache;
// nothing is allocated per layer but the small vectors of the attention report.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "pbs/attention.h"
#include "pbs/backend.h"
#include "pbs/status.h"
#include "server/model/kv_cache.h"
#include "server/model/model.h"
#include "server/model/prefill_plan.h"

namespace pbs {

struct PrefillInputs {
  std::span<const int32_t> tokens = {};  // [num_tokens], each below vocab_size
  // For every layer, with AttentionOptions::use_given_order / use_given_lists; device
  // memory, used until the run ends. Must satisfy ValidateOrder() / ValidateLists().
  ConstRows order = {};
  BlockListsView lists = {};
};

struct LayerReport {
  int32_t layer = 0;
  AttentionStats attention;  // with permute, select and attend seconds
  double qkv_seconds = 0;    // norm, projection, rotation, cache
  double mlp_seconds = 0;    // output projection, norm, MLP
  double seconds = 0;        // all of the layer
};

// Called from RunLayer() and CatchUp(), on their thread. Either call comes once for
// every layer, in the order of the layers.
class PrefillObserver {
 public:
  virtual ~PrefillObserver() = default;
  // The work that puts the layer's keys and values into the cache has been called (on
  // the CPU: is done). Its attention and MLP have not.
  virtual void OnKvReady(int32_t layer) = 0;
  // All of the layer is done. The next one's OnKvReady() may have come before.
  virtual void OnLayerDone(const LayerReport& report) = 0;
};

class PrefillRun {
 public:
  // Checks tokens, cache and workspace against the plan, and embeds the tokens. The
  // model, the plan, the cache and the workspace must outlive the run. InvalidArgument
  // names field, value and limit; ResourceExhausted for a workspace below the plan's.
  // Once started, the cache holds past_len tokens: what lay behind is written over.
  static StatusOr<std::unique_ptr<PrefillRun>> Start(const Model& model,
                                                     const PrefillPlan& plan,
                                                     const PrefillInputs& inputs,
                                                     KvCache& cache,
                                                     Workspace workspace);

  // Waits for the reports of what was called.
  ~PrefillRun();
  PrefillRun(const PrefillRun&) = delete;
  PrefillRun& operator=(const PrefillRun&) = delete;

  // Layers that may have been called and not finished.
  static int32_t LayersUnderWayMax(const Backend& backend);

  // Layers [0, next_layer()) have been called, [0, layers_finished()) are done.
  int32_t next_layer() const { return next_layer_; }
  int32_t layers_finished() const { return layers_finished_; }
  bool layers_done() const;
  // After the first RunLayer().
  double embed_seconds() const { return embed_seconds_; }

  // Calls the next layer and finishes what it must; `observer` may be null. After the
  // last one the cache's num_tokens is past_len + num_tokens. Cancelled when
  // control.stop is set: it is looked at between row tiles and inside attention; layers
  // that were under way are not told of then. After an error the run is over: destroy
  // it. The cache then still holds its past_len tokens.
  Status RunLayer(PrefillObserver* observer, const RunControl& control);
  // Finishes what was called. Another run may use the backend from then on, and must
  // not before: marks and reports are the backend's. Errors as RunLayer().
  Status CatchUp(PrefillObserver* observer);

  // Requires layers_done(). Final norm and output head on the wanted rows.
  Status ComputeLogits();
  // Logits of problem.logit_rows[index], f32 [vocab_size]; waits.
  Status ReadLogits(int32_t index, std::span<float> logits);

 private:
  // PrefillRegions in the workspace.
  struct Pointers {
    float* residual = nullptr;
    void* queries = nullptr;
    void* attended = nullptr;
    float* pooled_queries = nullptr;  // null where attention does not take them
    float* cosines = nullptr;
    float* sines = nullptr;
    Workspace attention;
    void* tile = nullptr;
    void* wide_tile = nullptr;
    Workspace linear;
    int32_t* logit_rows = nullptr;
    float* logit_residual = nullptr;
    void* logit_attended = nullptr;
    float* logit_normed = nullptr;
    float* logits = nullptr;
    int32_t* tokens = nullptr;
  };

  PrefillRun(const Model& model, const PrefillPlan& plan, const PrefillInputs& inputs,
             KvCache& cache, Workspace workspace);
  Status Embed(std::span<const int32_t> tokens);
  // Enqueues all of the next layer.
  Status CallLayer(PrefillObserver* observer, const RunControl& control);
  // Waits for the oldest layer under way and tells of it.
  Status FinishLayer(PrefillObserver* observer);
  Status RunQkv(int32_t layer, const RunControl& control);
  // Where the row tile that begins at `row` ends: not inside a block of pooled queries.
  int64_t TileEnd(int64_t row) const;
  // And starts its report.
  Status RunAttention(int32_t layer, const RunControl& control);
  // Everything behind attention.
  Status RunMlp(int32_t layer, const RunControl& control);
  // Rows of the residual stream with their attention outputs, tile by tile.
  Status RunMlpRows(const LayerWeights& layer, float* residual, const void* attended,
                    int64_t rows, const RunControl& control);
  Status CheckStop(const RunControl& control) const;

  const Model& model_;
  const PrefillPlan& plan_;
  Backend& backend_;
  KvCache& cache_;
  const ConstRows order_;
  const BlockListsView lists_;
  Pointers at_;
  int32_t next_layer_ = 0;
  int32_t layers_finished_ = 0;
  int32_t reports_under_way_ = 0;
  bool failed_ = false;
  double embed_seconds_ = 0;
};

}  // namespace pbs
