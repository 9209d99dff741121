#include "server/engine/prefill_group.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "pbs/check.h"
#include "server/base/status.h"

namespace pbs::server {

GroupBytes BytesOfGroup(const Model& model, const PrefillPlan& plan, bool shared) {
  const int64_t window = KvWindow::BytesOf(model.kv_shape(plan.problem.num_tokens));
  if (!model.backend().info().host_memory) {
    return {shared ? window : 0, plan.workspace_bytes + window};
  }
  return {plan.workspace_bytes + (shared ? 2 * window : 0), 0};
}

PrefillGroup::PrefillGroup(const Model& model, PrefillPlan plan,
                           std::vector<Prompt*> prompts,
                           std::vector<JobReservation> charged, const Clock& clock)
    : model_(model),
      plan_(std::move(plan)),
      num_prompts_(prompts.size()),
      charged_(std::move(charged)),
      clock_(clock),
      prompts_(std::move(prompts)) {}

absl::Status PrefillGroup::Begin() {
  Backend& backend = model_.backend();
  PBS_ABSL_ASSIGN_OR_RETURN(workspace_,
                            ToAbsl(backend.Allocate(plan_.workspace_bytes)));
  std::vector<int32_t> tokens;
  std::vector<const KvCache*> held;
  KvCache* cache = nullptr;
  CapturedQueries* queries = nullptr;
  {
    MutexLock lock(mutex_);
    for (Prompt* prompt : prompts_) {
      PBS_CHECK(prompt != nullptr);
      const auto own = prompt->tokens();
      tokens.insert(tokens.end(), own.begin(), own.end());
      held.push_back(&prompt->held().cache());
      cache = &prompt->held().writable_cache();
      queries = &prompt->held().writable_queries();
    }
  }
  if (num_prompts_ > 1 || !backend.info().host_memory) {
    PBS_ABSL_ASSIGN_OR_RETURN(window_, KvWindow::Create(held, backend, clock_));
    cache = &window_->cache();
  }
  if (num_prompts_ > 1) queries = nullptr;  // a prompt that captures runs alone
  PBS_ABSL_ASSIGN_OR_RETURN(
      run_,
      ToAbsl(PrefillRun::Start(model_, plan_, {.tokens = tokens, .queries = queries},
                               *cache, workspace_.workspace())));
  return absl::OkStatus();
}

absl::Status PrefillGroup::RunLayer(const RunControl& control) {
  PBS_ABSL_RETURN_IF_ERROR(set_aside_);
  if (run_ == nullptr) PBS_ABSL_RETURN_IF_ERROR(Begin());
  if (window_ != nullptr) {
    PBS_ABSL_RETURN_IF_ERROR(window_->MakeRoomFor(run_->next_layer()));
  }
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(run_->RunLayer(this, control)));
  return done() ? Conclude() : absl::OkStatus();
}

void PrefillGroup::SetAside() {
  if (run_ != nullptr && set_aside_.ok()) set_aside_ = ToAbsl(run_->CatchUp(this));
}

absl::Status PrefillGroup::Conclude() {
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(run_->ComputeLogits()));
  for (Prompt* prompt : LivePrompts()) prompt->OnLogits();
  if (window_ != nullptr) PBS_ABSL_RETURN_IF_ERROR(window_->Wait());
  bool is_first = true;
  for (Prompt* prompt : LivePrompts()) {
    prompt->OnRunDone(std::exchange(is_first, false));
  }
  return absl::OkStatus();
}

// Prompts leave on the group's thread only, so these stay while it is here.
std::vector<PrefillGroup::Prompt*> PrefillGroup::LivePrompts() {
  MutexLock lock(mutex_);
  std::vector<Prompt*> live;
  for (Prompt* prompt : prompts_) {
    if (prompt != nullptr) live.push_back(prompt);
  }
  return live;
}

absl::Status PrefillGroup::ReadLogits(int32_t row, std::span<float> logits) {
  return ToAbsl(run_->ReadLogits(row, logits));
}

void PrefillGroup::OnKvReady(int32_t layer) {
  if (window_ == nullptr) return TellHeld(layer);
  window_->Send(layer, [this, layer] { TellHeld(layer); });
}

void PrefillGroup::TellHeld(int32_t layer) {
  MutexLock lock(mutex_);
  for (Prompt* prompt : prompts_) {
    if (prompt != nullptr) prompt->OnHeld(layer);
  }
}

void PrefillGroup::OnLayerDone(const LayerReport& report) {
  bool is_first = true;
  for (Prompt* prompt : LivePrompts()) {
    prompt->OnLayerDone(report, std::exchange(is_first, false));
  }
}

void PrefillGroup::Leave(Prompt& prompt) {
  size_t index = 0;
  {
    MutexLock lock(mutex_);
    const auto found = std::find(prompts_.begin(), prompts_.end(), &prompt);
    PBS_CHECK(found != prompts_.end());
    *found = nullptr;
    index = static_cast<size_t>(found - prompts_.begin());
  }
  if (window_ != nullptr && num_prompts_ > 1) window_->DropPrompt(index);
}

}  // namespace pbs::server
