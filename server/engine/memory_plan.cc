#include "server/engine/memory_plan.h"
#include <cstdint>

#include "server/base/status.h"
#include "server/engine/kv_window.h"
#include "server/engine/prefill_task.h"

namespace pbs::server {

absl::StatusOr<PromptMemory> PlanPromptMemory(const Model& model, int32_t num_tokens,
                                              const AttentionOptions& attention) {
  PBS_ABSL_ASSIGN_OR_RETURN(
      const PrefillPlan plan,
      ToAbsl(PlanPrefill(model, {.num_tokens = num_tokens, .attention = attention})));
  const KvShape shape = model.kv_shape(num_tokens);
  PromptMemory memory = {
      .num_tokens = num_tokens, .workspace = plan.memory, .kv = shape.bytes()};
  const GroupBytes bytes = BytesOfGroup(model, plan, false);
  memory.host = memory.kv + LogitScratchBytes(model) + bytes.host;
  memory.device = bytes.device;
  if (!model.backend().info().host_memory) memory.kv_window = KvWindow::BytesOf(shape);
  return memory;
}

int32_t LongestPrompt(const Model& model, const AttentionOptions& attention,
                      int32_t tokens_max, const FreeMemory& free) {
  const auto fits = [&](int32_t num_tokens) {
    const auto memory = PlanPromptMemory(model, num_tokens, attention);
    return memory.ok() && memory->host <= free.host && memory->device <= free.device;
  };
  // Longer prompts take more: [low, high) holds the answer.
  int32_t low = 0;
  int32_t high = tokens_max + 1;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

}  // namespace pbs::server
