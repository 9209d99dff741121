// A prefill, one layer at a time, from tokens to keys, values and a few logits.
//
//   PlanPrefill -> KvCache::Create -> Allocate(plan.workspace_bytes)
//     -> PrefillRun::Start -> RunLayer x num_layers -> ComputeLogits -> ReadLogits
//
// Between layers the whole state is in the workspace and the cache, so a run can be
// suspended there (CatchUp()) and resumed. A run over `past_len` cached tokens
// continues them. Prefix reuse and decoding (decode.h) work this way.
//
// Several short prompts may share a run, back to back in the run's rows and in the
// cache. Each is a separate sequence for attention and starts at position 0.
//
// The last layer's output projection and MLP run only on the rows whose logits are
// wanted, because nothing reads the other rows.
//
// On a device with memory of its own the host is one layer ahead, so that the device
// never waits for it. RunLayer() enqueues a layer, then waits for the layer before it
// and reports that one; the last call waits for both. So an error in a layer is
// returned one call later, and the observer may by then have had OnKvReady() of the
// next layer. Where device memory is ordinary memory a call finishes and reports its
// own layer.
//
// Threading: one caller at a time, as the backend. Memory: the workspace and the cache.
// Per layer only the small vectors of the attention report are allocated.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "pbs/attention.h"
#include "pbs/backend.h"
#include "pbs/status.h"
#include "server/model/captured_queries.h"
#include "server/model/kv_cache.h"
#include "server/model/model.h"
#include "server/model/prefill_plan.h"

namespace pbs {

struct PrefillInputs {
  std::span<const int32_t> tokens = {};  // [num_tokens], each below vocab_size
  // Order and lists of every layer, with AttentionOptions::use_given_order and
  // use_given_lists. They are in device memory, must live until the run ends and must
  // satisfy ValidateOrder() and ValidateLists().
  ConstRows order = {};
  BlockListsView lists = {};
  // Receives the queries of its layers, before their OnKvReady(); it must live until
  // the run ends. Null: nothing is captured. One prompt only, with past_len 0.
  CapturedQueries* queries = nullptr;
};

struct LayerReport {
  int32_t layer = 0;
  AttentionStats attention;  // with permute, select and attend seconds
  AttentionHeads heads;
  double qkv_seconds = 0;  // norm, projection, rotation, cache
  double mlp_seconds = 0;  // output projection, norm, MLP
  double seconds = 0;      // the whole layer
};

// RunLayer() and CatchUp() call the observer on their thread. Each of its methods is
// called once for every layer, in the order of the layers.
class PrefillObserver {
 public:
  virtual ~PrefillObserver() = default;
  // The work that writes the layer's keys and values to the cache is enqueued (on the
  // CPU: done). The layer's attention and MLP are not.
  virtual void OnKvReady(int32_t layer) = 0;
  // The whole layer is done. OnKvReady() of the next layer may have come before.
  virtual void OnLayerDone(const LayerReport& report) = 0;
};

class PrefillRun {
 public:
  // Checks tokens, cache and workspace against the plan, and embeds the tokens. The
  // model, the plan, the cache and the workspace must outlive the run. InvalidArgument
  // names field, value and limit; ResourceExhausted for a workspace below the plan's.
  // After the start the cache holds past_len tokens; later ones are overwritten.
  static StatusOr<std::unique_ptr<PrefillRun>> Start(const Model& model,
                                                     const PrefillPlan& plan,
                                                     const PrefillInputs& inputs,
                                                     KvCache& cache,
                                                     Workspace workspace);

  // Waits for the reports of enqueued layers.
  ~PrefillRun();
  PrefillRun(const PrefillRun&) = delete;
  PrefillRun& operator=(const PrefillRun&) = delete;

  // The most layers that may be enqueued and unfinished.
  static int32_t LayersUnderWayMax(const Backend& backend);

  // Layers [0, next_layer()) are enqueued, [0, layers_finished()) are done.
  int32_t next_layer() const { return next_layer_; }
  int32_t layers_finished() const { return layers_finished_; }
  bool layers_done() const;
  // Valid after the first RunLayer().
  double embed_seconds() const { return embed_seconds_; }

  // Enqueues the next layer and finishes earlier ones as described above; `observer`
  // may be null. After the last layer the cache's num_tokens is past_len + num_tokens.
  // Cancelled when control.stop is set, which is checked between row tiles and inside
  // attention; layers under way are then not reported. After an error only destroy the
  // run; the cache still holds its past_len tokens.
  Status RunLayer(PrefillObserver* observer, const RunControl& control);
  // Finishes all enqueued layers. Another run may use the backend only after this call,
  // because time marks and reports belong to the backend. Errors as RunLayer().
  Status CatchUp(PrefillObserver* observer);

  // Runs the final norm and the output head on the wanted rows. Requires layers_done().
  Status ComputeLogits();
  // Waits for and copies the logits of problem.logit_rows[index], f32 [vocab_size].
  Status ReadLogits(int32_t index, std::span<float> logits);

 private:
  // PrefillRegions in the workspace.
  struct Pointers {
    float* residual = nullptr;
    void* queries = nullptr;
    void* attended = nullptr;
    float* pooled_queries = nullptr;  // null when the attention plan does not take them
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
  // Enqueues the whole next layer.
  Status CallLayer(PrefillObserver* observer, const RunControl& control);
  // Waits for the oldest layer under way and reports it.
  Status FinishLayer(PrefillObserver* observer);
  Status RunQkv(int32_t layer, const RunControl& control);
  // Copies the layer's queries to the host if they are wanted.
  Status CaptureQueries(int32_t layer);
  // End of the row tile that begins at `row`; never inside a block of pooled queries.
  int64_t TileEnd(int64_t row) const;
  // Runs the layer's attention and starts its report.
  Status RunAttention(int32_t layer, const RunControl& control);
  // Runs all steps after attention.
  Status RunMlp(int32_t layer, const RunControl& control);
  // Runs these steps on rows of the residual stream with their attention outputs, tile
  // by tile.
  Status RunMlpRows(const LayerWeights& layer, float* residual, const void* attended,
                    int64_t rows, const RunControl& control);
  Status CheckStop(const RunControl& control) const;

  const Model& model_;
  const PrefillPlan& plan_;
  Backend& backend_;
  KvCache& cache_;
  const ConstRows order_;
  const BlockListsView lists_;
  CapturedQueries* const queries_;
  Pointers at_;
  int32_t next_layer_ = 0;
  int32_t layers_finished_ = 0;
  int32_t reports_under_way_ = 0;
  bool failed_ = false;
  double embed_seconds_ = 0;
};

}  // namespace pbs
