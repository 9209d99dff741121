#include "server/model/prefill_plan.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "pbs/check.h"

namespace pbs {
namespace {

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

Status CheckHeadThresholds(const ModelConfig& config,
                           std::span<const float> thresholds) {
  const int64_t wanted = int64_t{config.num_layers} * config.num_heads;
  const auto size = static_cast<int64_t>(thresholds.size());
  if (size == 0 || size == wanted) return OkStatus();
  return InvalidArgument("head_thresholds has " + std::to_string(size) +
                         " values; the model's layers have " + std::to_string(wanted) +
                         " query heads");
}

int64_t LinearWorkspaceBytes(const Model& model, int64_t rows) {
  int64_t bytes = 0;
  for (const LayerWeights& layer : model.weights().layers) {
    for (const auto* linear :
         {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
      bytes = std::max(bytes, model.backend().LinearWorkspaceBytes(**linear, rows));
    }
  }
  return bytes;
}

}  // namespace

void PlaceRegions(const Model& model, PrefillPlan& plan) {
  const ModelConfig& config = model.config();
  const int64_t tokens = plan.problem.num_tokens;
  const int64_t tile = plan.row_tile;
  const auto logit_rows = static_cast<int64_t>(plan.problem.logit_rows.size());
  const int64_t hidden = config.hidden_size;
  const int64_t heads = config.attention_features();
  const int64_t rotated = config.head_dim / 2;
  const int64_t kv_bytes = DTypeBytes(model.kv_dtype());
  const int64_t compute_bytes = DTypeBytes(model.compute_dtype());
  PrefillRegions& at = plan.regions;
  PrefillMemory& memory = plan.memory;
  WorkspaceLayout layout;

  at.residual = layout.Add<float>(tokens * hidden);
  memory.residual = layout.TakePart();
  at.queries = layout.AddBytes(tokens * heads * kv_bytes);
  at.attended = layout.AddBytes(tokens * heads * kv_bytes);
  memory.queries = layout.TakePart();
  at.pooled_queries = layout.AddBytes(plan.attention->pooled_queries_bytes);
  memory.pooled_queries = layout.TakePart();
  at.cosines = layout.Add<float>(tokens * rotated);
  at.sines = layout.Add<float>(tokens * rotated);
  memory.rotations = layout.TakePart();

  WorkspaceLayout tiles = layout;
  at.attention = layout.AddBytes(plan.attention->workspace_bytes);
  memory.attention = layout.TakePart();
  at.tile = tiles.AddBytes(tile * std::max(hidden, heads) * compute_bytes);
  at.wide_tile = tiles.AddBytes(
      tile * std::max(config.qkv_features(), config.intermediate_size) * compute_bytes);
  memory.tiles = tiles.TakePart();
  at.linear = tiles.AddBytes(LinearWorkspaceBytes(model, tile));
  memory.linear = tiles.TakePart();
  layout.Cover(tiles);
  layout.TakePart();  // counted above

  at.logit_rows = layout.Add<int32_t>(logit_rows);
  at.logit_residual = layout.Add<float>(logit_rows * hidden);
  at.logit_normed = layout.Add<float>(logit_rows * hidden);
  at.logit_attended = layout.AddBytes(logit_rows * heads * kv_bytes);
  at.logits = layout.Add<float>(logit_rows * config.vocab_size);
  memory.logits = layout.TakePart();
  at.tokens = layout.Add<int32_t>(tokens);
  memory.tokens = layout.TakePart();
  plan.workspace_bytes = layout.bytes();
  PBS_CHECK(plan.workspace_bytes == memory.total());
}

StatusOr<PrefillPlan> PlanPrefill(const Model& model, PrefillProblem problem) {
  const ModelConfig& config = model.config();
  PBS_RETURN_IF_ERROR(CheckProblem(config, problem));
  PBS_RETURN_IF_ERROR(CheckHeadThresholds(config, problem.head_thresholds));
  if (problem.logit_rows.empty()) problem.logit_rows = {problem.num_tokens - 1};
  if (problem.prompt_tokens.empty()) problem.prompt_tokens = {problem.num_tokens};
  AttentionProblem attention = {
      .shape = {.num_heads = config.num_heads,
                .num_kv_heads = config.num_kv_heads,
                .head_dim = config.head_dim,
                .sequences = {}},
      .dtype = model.kv_dtype(),
      .options = problem.attention,
      .offers_pooled_queries = true,
      .has_head_thresholds = !problem.head_thresholds.empty()};
  for (int32_t tokens : problem.prompt_tokens) {
    attention.shape.sequences.push_back(
        {.q_len = tokens, .k_len = problem.past_len + tokens});
  }
  PrefillPlan plan;
  plan.problem = std::move(problem);
  PBS_ASSIGN_OR_RETURN(plan.attention, model.backend().Plan(attention));
  plan.row_tile = std::min(plan.problem.num_tokens, model.backend().info().row_tile);
  PlaceRegions(model, plan);
  return plan;
}

}  // namespace pbs
