#include "server/engine/prefill_task.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "server/base/status.h"

namespace pbs::server {
namespace {

bool AllFinite(const std::vector<float>& logits) {
  return std::all_of(logits.begin(), logits.end(),
                     [](float logit) { return std::isfinite(logit); });
}

double AttentionSeconds(const StageTimes& stages) {
  return stages.permute + stages.select + stages.attend;
}
double LinearSeconds(const StageTimes& stages) {
  return stages.embed + stages.qkv + stages.mlp;
}

}  // namespace

std::vector<int32_t> LogitRows(const PrefillJob& job) {
  std::vector<int32_t> rows = job.logit_positions;
  rows.push_back(static_cast<int32_t>(job.tokens.size()) - 1);
  return rows;
}

int64_t LogitScratchBytes(const Model& model) {
  return 2 * static_cast<int64_t>(sizeof(float)) * model.config().vocab_size;
}

CostKey PrefillCostKey(const ServedModel& model, const AttentionOptions& attention) {
  return {&model, attention.method, model.model().kv_dtype(),
          model.model().config().head_dim};
}

Work PrefillWork(int32_t num_tokens) {
  const double tokens = num_tokens;
  return {tokens, tokens * tokens};
}

PrefillTask::PrefillTask(const Parts& parts, PrefillJob job, PrefillPlan plan,
                         PrefillListener& listener)
    : parts_(parts),
      job_(std::move(job)),
      plan_(std::move(plan)),
      listener_(listener) {}

void PrefillTask::Start(const JobTiming& timing) {
  timing_ = timing;
  result_.stages.queue = absl::ToDoubleSeconds(timing.started - timing.admitted);
}

absl::Status PrefillTask::Begin() {
  const Model& model = parts_.model;
  PBS_ABSL_ASSIGN_OR_RETURN(workspace_,
                            ToAbsl(model.backend().Allocate(plan_.workspace_bytes)));
  KvCache* cache = &job_.kv->writable_cache();
  if (!model.backend().info().host_memory) {
    PBS_ABSL_ASSIGN_OR_RETURN(window_,
                              KvWindow::Create(*cache, model.backend(), parts_.clock));
    cache = &window_->cache();
  }
  PBS_ABSL_ASSIGN_OR_RETURN(
      run_, ToAbsl(PrefillRun::Start(model, plan_, {.tokens = job_.tokens}, *cache,
                                     workspace_.workspace())));
  result_.stages.embed = run_->embed_seconds();
  return absl::OkStatus();
}

absl::StatusOr<StepResult> PrefillTask::Step(const RunControl& control) {
  if (run_ == nullptr) PBS_ABSL_RETURN_IF_ERROR(Begin());
  if (window_ != nullptr) {
    PBS_ABSL_RETURN_IF_ERROR(window_->MakeRoomFor(run_->next_layer()));
  }
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(run_->RunLayer(this, control)));
  if (run_->layers_done()) {
    PBS_ABSL_RETURN_IF_ERROR(ReadResult());
    if (window_ != nullptr) {
      PBS_ABSL_RETURN_IF_ERROR(window_->Wait());
      result_.stages.copy = window_->wait_seconds();
      result_.kv_copy_seconds = window_->copy_seconds();
    }
    job_.kv->writable_cache().set_num_tokens(static_cast<int32_t>(job_.tokens.size()));
    result_.total_seconds = SecondsSinceAdmission();
    Measure();
  }
  const double layers = parts_.model.config().num_layers;
  return StepResult{run_->layers_done(), run_->next_layer() / layers};
}

void PrefillTask::OnKvReady(int32_t layer) {
  if (window_ == nullptr) return OnHeld(layer);
  window_->Send(layer, [this, layer] { OnHeld(layer); });
}

void PrefillTask::OnHeld(int32_t layer) {
  if (layer == 0) result_.time_to_first_layer_seconds = SecondsSinceAdmission();
  job_.kv->Publish(layer + 1);
  MutexLock lock(listener_mutex_);
  listener_.OnKvReady(layer);
}

void PrefillTask::OnLayerDone(const LayerReport& report) {
  const AttentionStats& attention = report.attention;
  StageTimes& stages = result_.stages;
  stages.qkv += report.qkv_seconds;
  stages.permute += attention.permute_seconds;
  stages.select += attention.select_seconds;
  stages.attend += attention.attend_seconds;
  stages.mlp += report.mlp_seconds;
  result_.layers.push_back(attention);
  parts_.metrics.flops_computed.Increment(attention.executed_flops);
  parts_.metrics.flops_dense.Increment(attention.dense_flops);
  parts_.metrics.Density(attention.method_run).Observe(attention.Density());
  MutexLock lock(listener_mutex_);
  listener_.OnLayerDone(report.layer, attention.Density(), report.seconds);
}

absl::Status PrefillTask::ReadResult() {
  const absl::Time begin = parts_.clock.Now();
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(run_->ComputeLogits()));
  std::vector<float> logits(static_cast<size_t>(parts_.model.config().vocab_size));
  const auto num_positions = static_cast<int32_t>(job_.logit_positions.size());
  result_.positions.resize(job_.logit_positions.size());
  for (int32_t i = 0; i < num_positions; ++i) {
    PBS_ABSL_RETURN_IF_ERROR(
        ReadRow(i, logits, &result_.positions[static_cast<size_t>(i)]));
  }
  PBS_ABSL_RETURN_IF_ERROR(ReadRow(num_positions, logits, &result_.top_logits));
  result_.first_token_id = Argmax(logits);
  if (job_.all_logits_last_token) result_.last_token_logits = std::move(logits);
  result_.stages.mlp += absl::ToDoubleSeconds(parts_.clock.Now() - begin);
  return absl::OkStatus();
}

absl::Status PrefillTask::ReadRow(int32_t row, std::vector<float>& logits,
                                  std::vector<ScoredToken>* best) {
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(run_->ReadLogits(row, logits)));
  if (!AllFinite(logits)) {
    return absl::InternalError("the model's logits are not finite");
  }
  *best = TopTokens(logits, job_.top_logits);
  return absl::OkStatus();
}

void PrefillTask::Measure() {
  const EngineMetrics& metrics = parts_.metrics;
  const StageTimes& stages = result_.stages;
  const absl::Time now = parts_.clock.Now();
  metrics.prefill_time.Observe(absl::ToDoubleSeconds(now - timing_.started));
  metrics.time_to_first_layer.Observe(result_.time_to_first_layer_seconds);
  metrics.time_to_kv_ready.Observe(result_.total_seconds);
  metrics.prompt_tokens.Increment(static_cast<double>(job_.tokens.size()));
  const std::pair<Stage, double> observed[] = {
      {Stage::kEmbed, stages.embed},     {Stage::kQkv, stages.qkv},
      {Stage::kPermute, stages.permute}, {Stage::kSelect, stages.select},
      {Stage::kAttend, stages.attend},   {Stage::kMlp, stages.mlp}};
  metrics.StageTime(Stage::kQueue).Observe(stages.queue);
  for (const auto& [stage, seconds] : observed) {
    if (seconds > 0) metrics.StageTime(stage).Observe(seconds);
  }
  double coverage = 0;
  for (const AttentionStats& layer : result_.layers) coverage += layer.coverage;
  if (result_.layers.front().coverage_rows > 0) {
    metrics.coverage.Observe(coverage / static_cast<double>(result_.layers.size()));
  }
  parts_.costs.Measure(PrefillCostKey(*job_.model, job_.attention),
                       PrefillWork(static_cast<int32_t>(job_.tokens.size())),
                       {LinearSeconds(stages), AttentionSeconds(stages)}, now);
}

double PrefillTask::SecondsSinceAdmission() const {
  return absl::ToDoubleSeconds(parts_.clock.Now() - timing_.admitted);
}

void PrefillTask::Finish(const absl::Status& status) {
  run_.reset();
  window_.reset();
  workspace_ = Buffer();
  const std::shared_ptr<HeldKv> kv = std::move(job_.kv);
  job_ = PrefillJob();
  kv->Finish(status);
  if (status.ok()) {
    listener_.OnDone(std::move(result_));
  } else {
    listener_.OnDone(status);
  }
}

}  // namespace pbs::server
