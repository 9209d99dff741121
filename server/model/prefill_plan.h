// The plan of a prefill: its steps and its memory, computed before anything is
// allocated.
//
// Threading: pure functions; plans are immutable. Device: host-only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "pbs/attention.h"
#include "pbs/status.h"
#include "pbs/workspace.h"
#include "server/model/model.h"

namespace pbs {

inline constexpr int32_t kLogitRowsMax = 1024;

struct PrefillProblem {
  int32_t num_tokens = 0;  // tokens of this run, at least 1
  int32_t past_len = 0;    // tokens that the cache holds already
  AttentionOptions attention = {};
  // Tokens of this run, counted from its first, whose logits are wanted; at most
  // kLogitRowsMax, in any order. Empty: the last token.
  std::vector<int32_t> logit_rows = {};
  // For several prompts that share the run back to back: the number of tokens of each,
  // whose sum is num_tokens; past_len is then 0. Empty: one prompt.
  std::vector<int32_t> prompt_tokens = {};
  // A threshold for every query head of every layer, [num_layers, num_heads], each in
  // (0, 1]; empty: attention.threshold. They must outlive the plan and its runs.
  std::span<const float> head_thresholds = {};
};

// Bytes of the workspace by purpose. `attention` and `tiles` + `linear` share their
// bytes, because they are never in use at the same time.
struct PrefillMemory {
  int64_t residual = 0;
  int64_t queries = 0;         // and attention outputs
  int64_t pooled_queries = 0;  // AttentionPlan::pooled_queries_bytes
  int64_t rotations = 0;       // cosines and sines
  int64_t attention = 0;       // the backend's attention workspace
  int64_t tiles = 0;           // activations of one row tile
  int64_t linear = 0;          // the backend's linear workspace
  // Logits of the wanted rows and their intermediate values
  int64_t logits = 0;
  int64_t tokens = 0;  // ids

  int64_t total() const {
    return residual + queries + pooled_queries + rotations +
           std::max(attention, tiles + linear) + logits + tokens;
  }
};

// Where the workspace holds what: offsets in bytes. Shapes are row-major.
struct PrefillRegions {
  int64_t residual = 0;        // f32 [num_tokens, hidden]
  int64_t queries = 0;         // KV dtype [num_tokens, num_heads head_dim]
  int64_t attended = 0;        // KV dtype [num_tokens, num_heads head_dim]
  int64_t pooled_queries = 0;  // f32, empty where attention does not take them
  int64_t cosines = 0;         // f32 [num_tokens, head_dim / 2]
  int64_t sines = 0;           // f32 [num_tokens, head_dim / 2]
  int64_t attention = 0;
  int64_t tile = 0;       // compute dtype [row_tile, max(hidden, heads)]
  int64_t wide_tile = 0;  // compute dtype [row_tile, max(qkv, intermediate)]
  int64_t linear = 0;
  int64_t logit_rows = 0;      // int32 [logit rows]
  int64_t logit_residual = 0;  // f32 [logit rows, hidden]
  int64_t logit_normed = 0;    // f32 [logit rows, hidden]
  int64_t logit_attended = 0;  // KV dtype [logit rows, num_heads head_dim]
  int64_t logits = 0;          // f32 [logit rows, vocab_size]
  int64_t tokens = 0;          // int32 [num_tokens]
};

struct PrefillPlan {
  PrefillProblem problem;  // with logit_rows and prompt_tokens filled in
  std::unique_ptr<AttentionPlan> attention;
  PrefillMemory memory;
  PrefillRegions regions;
  int64_t workspace_bytes = 0;  // memory.total(); without the KV cache (kv_cache.h)
  // Rows that pass through a linear layer at once, at most the backend's row_tile.
  // Weights are read once per tile. The tile bounds the memory of activations beside
  // the residual stream.
  int32_t row_tile = 0;
};

// InvalidArgument names field, value and limit. Errors of the backend's Plan() are
// passed on.
StatusOr<PrefillPlan> PlanPrefill(const Model& model, PrefillProblem problem);

// Sets regions, memory and workspace_bytes of a plan that has all else.
void PlaceRegions(const Model& model, PrefillPlan& plan);

}  // namespace pbs
