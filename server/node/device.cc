#include "server/node/device.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/backend/memory_budget.h"
#include "server/base/status.h"
#include "server/engine/memory_plan.h"
#include "server/engine/self_test.h"

namespace pbs::server {
namespace {

std::optional<ByteLedger> MakeLedger(const CudaSettings& settings,
                                     const Backend& backend) {
  if (backend.info().host_memory) return std::nullopt;
  return std::optional<ByteLedger>(std::in_place, DeviceBudget(settings, backend));
}

// By default prompts share runs where one alone would leave a device idle.
BatchLimits BatchLimitsOf(const SchedulingSettings& settings, const Backend& backend) {
  const BackendInfo& info = backend.info();
  const int32_t tokens_max = info.host_memory ? 1 : info.row_tile;
  return {.tokens_max =
              settings.batch_tokens_max > 0 ? settings.batch_tokens_max : tokens_max,
          .prompt_tokens_max = settings.batch_prompt_tokens_max};
}

absl::Status AboutModel(const std::string& model, const absl::Status& status) {
  return {status.code(), absl::StrCat("model ", model, ": ", status.message())};
}

}  // namespace

int32_t TokensMax(const ModelSettings& source, const Model& model,
                  const ServiceLimits& limits) {
  const int32_t tokens_max = std::min(model.config().max_tokens, limits.tokens_max);
  return source.tokens_max > 0 ? std::min(tokens_max, source.tokens_max) : tokens_max;
}

Device::Device(int32_t number, std::unique_ptr<Backend> backend,
               const ServerSettings& settings, const Shared& shared)
    : number_(number),
      settings_(settings),
      shared_(shared),
      backend_(std::move(backend)),
      ledger_(MakeLedger(settings.cuda, *backend_)),
      engine_({.queue_requests_max = settings.service.limits.queue_requests_max,
               .yield_share = settings.scheduling.yield_share,
               .batch = BatchLimitsOf(settings.scheduling, *backend_),
               .shared_caches = !settings.shared_memory_socket.empty()},
              {*backend_, shared.ledger, shared.clock, shared.timers, shared.metrics,
               shared.costs, ledger_ ? &*ledger_ : nullptr, number}) {
  const BackendInfo& info = backend_->info();
  shared_.metrics.SetBackendInfo({info.name, info.isa, info.device});
}

absl::Status Device::RunSelfTest() const {
  PBS_ABSL_ASSIGN_OR_RETURN(const SelfTestReport report,
                            server::RunSelfTest(*backend_, *backend_));
  shared_.log.Info("self_test_passed", {{"device", number_},
                                        {"cases", report.num_cases},
                                        {"worst_f32_error", report.worst_f32_error}});
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Model>> Device::LoadModel(
    const ModelSettings& source, const std::atomic<bool>& stop) {
  const Clock& clock = shared_.clock;
  shared_.log.Info(
      "model_loading",
      {{"model", source.name}, {"device", number_}, {"path", source.path}});
  const absl::Time begin = clock.Now();
  absl::Time reported = begin;
  ModelOptions options;
  options.kv_dtype = source.kv_dtype;
  options.rope.attn_factor = source.yarn_attn_factor;
  options.control.stop = &stop;
  options.control.progress = [&](int64_t done, int64_t total) {
    constexpr absl::Duration kReportInterval = absl::Seconds(2);
    if (clock.Now() - reported < kReportInterval) return;
    reported = clock.Now();
    shared_.log.Info("model_progress",
                     {{"model", source.name}, {"bytes", done}, {"bytes_total", total}});
  };
  auto loaded = ToAbsl(Model::Load(source.path, options, *backend_));
  if (!loaded.ok()) return AboutModel(source.name, loaded.status());
  const Model& model = **loaded;
  shared_.log.Info("model_loaded",
                   {{"model", source.name},
                    {"device", number_},
                    {"architecture", ArchitectureName(model.config().architecture)},
                    {"layers", model.config().num_layers},
                    {"weight_bytes", model.weight_bytes()},
                    {"compute_dtype", DTypeName(model.compute_dtype())},
                    {"kv_dtype", DTypeName(model.kv_dtype())},
                    {"tokens_max", TokensMax(source, model, settings_.service.limits)},
                    {"model_digest", model.digest()},
                    {"seconds", absl::ToDoubleSeconds(clock.Now() - begin)}});
  for (const std::string& note : model.notes()) {
    shared_.log.Warning("model_note", {{"model", source.name}, {"note", note}});
  }
  absl::Status status = WithholdWeights(model);
  if (status.ok()) status = CheckThatItRuns(model);
  if (!status.ok()) return AboutModel(source.name, status);
  return loaded;
}

absl::Status Device::WithholdWeights(const Model& model) {
  if (!ledger_ || settings_.cuda.memory_bytes_max > 0) return absl::OkStatus();
  const absl::Status status = ledger_->Withhold(model.weight_bytes());
  if (status.ok()) return status;
  return {status.code(),
          absl::StrCat("weights on device ", number_, ": ", status.message())};
}

absl::Status Device::CheckThatItRuns(const Model& model) const {
  const absl::Status status =
      PlanPromptMemory(model, 1, settings_.service.default_attention.options).status();
  if (status.ok()) return status;
  return {status.code(), absl::StrCat("it cannot run on the ", backend_->info().name,
                                      " backend: ", status.message())};
}

void Device::LogMemoryPlan(const ModelSettings& source, const Model& model) const {
  const AttentionOptions& attention = settings_.service.default_attention.options;
  const int32_t tokens_max = TokensMax(source, model, settings_.service.limits);
  const FreeMemory free = {shared_.ledger.bytes_max() - shared_.ledger.bytes_held(),
                           bytes_max() - bytes_held()};
  const int32_t longest = LongestPrompt(model, attention, tokens_max, free);
  auto memory = PlanPromptMemory(model, tokens_max, attention);
  if (!memory.ok()) memory = PlanPromptMemory(model, std::max(1, longest), attention);
  const PrefillMemory& workspace = memory->workspace;
  shared_.log.Info("memory_plan", {{"model", source.name},
                                   {"device", number_},
                                   {"tokens", memory->num_tokens},
                                   {"longest_prompt_that_fits", longest},
                                   {"host_bytes", memory->host},
                                   {"host_bytes_free", free.host},
                                   {"device_bytes", memory->device},
                                   {"device_bytes_free", free.device},
                                   {"kv_bytes", memory->kv},
                                   {"kv_window_bytes", memory->kv_window},
                                   {"residual_bytes", workspace.residual},
                                   {"queries_bytes", workspace.queries},
                                   {"rotations_bytes", workspace.rotations},
                                   {"attention_bytes", workspace.attention},
                                   {"tiles_bytes", workspace.tiles},
                                   {"linear_bytes", workspace.linear},
                                   {"logits_bytes", workspace.logits}});
  if (longest < tokens_max) {
    shared_.log.Warning("prompts_beyond_memory",
                        {{"model", source.name},
                         {"tokens_max", tokens_max},
                         {"longest_prompt_that_fits", longest},
                         {"note", "longer ones are refused; see memory_plan"}});
  }
}

}  // namespace pbs::server
