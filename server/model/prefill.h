// A prefill, one layer at a time: tokens in, keys and values and a few logits out.
//
//   PlanPrefill -> KvCache::Create -> Allocate(plan.workspace_bytes)
//     -> PrefillRun::Start -> RunLayer x num_layers -> ComputeLogits -> ReadLogits
//
// Between layers the whole state is the workspace and the cache, so a run may be set
// aside there and taken up again. A run over `past_len` cached tokens continues them:
// that is how prefixes are reused and how decoding works (decode.h).
//
// Several short prompts may run as one, back to back in the run's rows and in the
// cache: every one is a sequence of its own to attention and starts at position 0.
//
// The last layer's output projection and MLP run on the rows whose logits are wanted
// only: nothing else reads the others.
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

// Called from RunLayer(), on its thread.
class PrefillObserver {
 public:
  virtual ~PrefillObserver() = default;
  // The work that puts the layer's keys and values into the cache has been called (on
  // the CPU: is done). Its attention and MLP have not.
  virtual void OnKvReady(int32_t layer) = 0;
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

  // Layers [0, next_layer()) are done.
  int32_t next_layer() const { return next_layer_; }
  bool layers_done() const;
  double embed_seconds() const { return embed_seconds_; }

  // Runs the next layer; `observer` may be null. After the last one the cache's
  // num_tokens is past_len + num_tokens. Cancelled when control.stop is set: it is
  // looked at between row tiles and inside attention. After an error the run is over:
  // destroy it. The cache then still holds its past_len tokens.
  Status RunLayer(PrefillObserver* observer, const RunControl& control);

  // Requires layers_done(). Final norm and output head on the wanted rows.
  Status ComputeLogits();
  // Logits of problem.logit_rows[index], f32 [vocab_size]; waits.
  Status ReadLogits(int32_t index, std::span<float> logits);

 private:
  // The workspace, cut up as planned.
  struct Regions {
    float* residual = nullptr;
    void* queries = nullptr;
    void* attended = nullptr;
    float* pooled_queries = nullptr;  // null where attention does not take them
    float* cosines = nullptr;
    float* sines = nullptr;
    Workspace attention;
    void* tile = nullptr;       // [row_tile, max(hidden, heads)]
    void* wide_tile = nullptr;  // [row_tile, max(qkv, intermediate)]
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
  Status RunQkv(int32_t layer, const RunControl& control);
  // Where the row tile that begins at `row` ends: not inside a block of pooled queries.
  int64_t TileEnd(int64_t row) const;
  Status RunAttention(int32_t layer, const RunControl& control, AttentionStats& stats);
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
  Regions at_;
  int32_t next_layer_ = 0;
  bool failed_ = false;
  double embed_seconds_ = 0;
};

}  // namespace pbs
