#include "server/model/decode.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "server/model/prefill.h"

namespace pbs {
namespace {

StatusOr<PrefillPlan> PlanStep(const Model& model, int32_t past_len) {
  return PlanPrefill(
      model,
      {.num_tokens = 1, .past_len = past_len, .attention = {.method = Method::kDense}});
}

}  // namespace

Decoder::Decoder(const Model& model, KvCache& cache)
    : model_(model),
      cache_(cache),
      logits_(static_cast<size_t>(model.config().vocab_size)) {}

StatusOr<std::unique_ptr<Decoder>> Decoder::Create(const Model& model, KvCache& cache) {
  auto decoder = std::unique_ptr<Decoder>(new Decoder(model, cache));
  const int32_t longest =
      std::min(cache.shape().capacity, model.config().max_tokens) - 1;
  PBS_ASSIGN_OR_RETURN(const PrefillPlan plan, PlanStep(model, longest));
  PBS_ASSIGN_OR_RETURN(decoder->workspace_,
                       model.backend().Allocate(plan.workspace_bytes));
  return decoder;
}

StatusOr<std::span<const float>> Decoder::Step(int32_t token) {
  PBS_ASSIGN_OR_RETURN(const PrefillPlan plan, PlanStep(model_, cache_.num_tokens()));
  if (plan.workspace_bytes > workspace_.bytes()) {
    PBS_ASSIGN_OR_RETURN(workspace_, model_.backend().Allocate(plan.workspace_bytes));
  }
  const int32_t tokens[] = {token};
  PBS_ASSIGN_OR_RETURN(auto run, PrefillRun::Start(model_, plan, {.tokens = tokens},
                                                   cache_, workspace_.workspace()));
  while (!run->layers_done()) PBS_RETURN_IF_ERROR(run->RunLayer(nullptr, {}));
  PBS_RETURN_IF_ERROR(run->ComputeLogits());
  PBS_RETURN_IF_ERROR(run->ReadLogits(0, logits_));
  return std::span<const float>(logits_);
}

}  // namespace pbs
