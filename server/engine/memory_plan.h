// Memory that prompts of a model take, computed before anything is allocated.
//
// Threading: pure functions.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "server/model/model.h"
#include "server/model/prefill_plan.h"

namespace pbs::server {

// Memory of one prompt that runs alone with one row of logits, as the engine charges it
// (ReservePrefill). A prompt that may share a run is also charged its part of a window.
struct PromptMemory {
  int32_t num_tokens = 0;
  PrefillMemory workspace;
  int64_t kv = 0;         // all layers, as a lease holds them
  int64_t kv_window = 0;  // layers on a device with memory of its own; else 0
  int64_t host = 0;       // charged to the host's ledger
  int64_t device = 0;     // charged to the device's; 0 where that is host memory
};

// Errors as PlanPrefill().
absl::StatusOr<PromptMemory> PlanPromptMemory(const Model& model, int32_t num_tokens,
                                              const AttentionOptions& attention);

struct FreeMemory {
  int64_t host = 0;
  int64_t device = 0;
};

// The longest prompt of at most `tokens_max` tokens that fits when nothing else runs;
// 0: none fits.
int32_t LongestPrompt(const Model& model, const AttentionOptions& attention,
                      int32_t tokens_max, const FreeMemory& free);

}  // namespace pbs::server
