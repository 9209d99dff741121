#include "server/model/prefill_plan.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

namespace pbs {
namespace {

int64_t Align(int64_t bytes) {
  return (bytes + kMemoryAlignment - 1) / kMemoryAlignment * kMemoryAlignment;
}

Status CheckTokens(const ModelConfig& config, int32_t num_tokens) {
  if (num_tokens >= 1 && num_tokens <= config.max_tokens) return OkStatus();
  return InvalidArgument("num_tokens " + std::to_string(num_tokens) +
                         " is outside [1, " + std::to_string(config.max_tokens) + "]" +
                         config.max_tokens_reason);
}

// Of several prompts: each as if it were alone.
Status CheckPrompts(const ModelConfig& config, const PrefillProblem& problem) {
  int64_t total = 0;
  for (int32_t tokens : problem.prompt_tokens) {
    PBS_RETURN_IF_ERROR(CheckTokens(config, tokens));
    total += tokens;
  }
  if (total != problem.num_tokens) {
    return InvalidArgument("prompt_tokens add up to " + std::to_string(total) +
                           "; num_tokens is " + std::to_string(problem.num_tokens));
  }
  if (problem.past_len == 0 && !problem.attention.use_given_order &&
      !problem.attention.use_given_lists) {
    return OkStatus();
  }
  return InvalidArgument(
      "several prompts run as one without past_len, a given order and given lists");
}

Status CheckProblem(const ModelConfig& config, const PrefillProblem& problem) {
  const auto text = [](int64_t value) { return std::to_string(value); };
  PBS_RETURN_IF_ERROR(problem.prompt_tokens.size() > 1
                          ? CheckPrompts(config, problem)
                          : CheckTokens(config, problem.num_tokens));
  const bool one_prompt = problem.prompt_tokens.size() <= 1;
  if (problem.past_len < 0 ||
      (one_prompt && problem.past_len > config.max_tokens - problem.num_tokens)) {
    return InvalidArgument("past_len " + text(problem.past_len) + " with num_tokens " +
                           text(problem.num_tokens) + " is outside [0, " +
                           text(config.max_tokens - problem.num_tokens) + "]" +
                           config.max_tokens_reason);
  }
  if (static_cast<int64_t>(problem.logit_rows.size()) > kLogitRowsMax) {
    return InvalidArgument(text(static_cast<int64_t>(problem.logit_rows.size())) +
                           " logit_rows exceed " + text(kLogitRowsMax));
  }
  for (int32_t row : problem.logit_rows) {
    if (row < 0 || row >= problem.num_tokens) {
      return InvalidArgument("logit_rows holds " + text(row) + ", outside [0, " +
                             text(problem.num_tokens - 1) + "]");
    }
  }
  return OkStatus();
}

PrefillMemory PlanMemory(const Model& model, const PrefillPlan& plan) {
  const ModelConfig& config = model.config();
  const ModelWeights& weights = model.weights();
  const int64_t tokens = plan.problem.num_tokens;
  const int64_t tile = plan.row_tile;
  const auto logit_rows = static_cast<int64_t>(plan.problem.logit_rows.size());
  const int64_t hidden = config.hidden_size;
  const int64_t heads = config.attention_features();
  const int64_t kv_bytes = DTypeBytes(model.kv_dtype());
  const int64_t compute_bytes = DTypeBytes(weights.compute_dtype);
  constexpr int64_t kFloat = 4;

  PrefillMemory memory;
  memory.residual = Align(tokens * hidden * kFloat);
  memory.queries = 2 * Align(tokens * heads * kv_bytes);
  memory.pooled_queries = Align(plan.attention->pooled_queries_bytes);
  memory.rotations = 2 * Align(tokens * (config.head_dim / 2) * kFloat);
  memory.attention = Align(plan.attention->workspace_bytes);
  memory.tiles =
      Align(tile * std::max(hidden, heads) * compute_bytes) +
      Align(tile * std::max(config.qkv_features(), config.intermediate_size) *
            compute_bytes);
  for (const LayerWeights& layer : weights.layers) {
    for (const auto* linear :
         {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
      memory.linear = std::max(
          memory.linear, Align(model.backend().LinearWorkspaceBytes(**linear, tile)));
    }
  }
  // Row indices; residual and attention output of these rows; final norm; logits.
  memory.logits = Align(logit_rows * kFloat) + 2 * Align(logit_rows * hidden * kFloat) +
                  Align(logit_rows * heads * kv_bytes) +
                  Align(logit_rows * config.vocab_size * kFloat);
  memory.tokens = Align(tokens * kFloat);
  return memory;
}

}  // namespace

StatusOr<PrefillPlan> PlanPrefill(const Model& model, PrefillProblem problem) {
  const ModelConfig& config = model.config();
  PBS_RETURN_IF_ERROR(CheckProblem(config, problem));
  if (problem.logit_rows.empty()) problem.logit_rows = {problem.num_tokens - 1};
  if (problem.prompt_tokens.empty()) problem.prompt_tokens = {problem.num_tokens};
  AttentionProblem attention = {.shape = {.num_heads = config.num_heads,
                                          .num_kv_heads = config.num_kv_heads,
                                          .head_dim = config.head_dim,
                                          .sequences = {}},
                                .dtype = model.kv_dtype(),
                                .options = problem.attention,
                                .offers_pooled_queries = true};
  for (int32_t tokens : problem.prompt_tokens) {
    attention.shape.sequences.push_back({tokens, problem.past_len + tokens});
  }
  PrefillPlan plan;
  plan.problem = std::move(problem);
  PBS_ASSIGN_OR_RETURN(plan.attention, model.backend().Plan(attention));
  plan.row_tile = std::min(plan.problem.num_tokens, model.backend().info().row_tile);
  plan.memory = PlanMemory(model, plan);
  plan.workspace_bytes = plan.memory.total();
  return plan;
}

}  // namespace pbs
