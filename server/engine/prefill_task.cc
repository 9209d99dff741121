#include "server/engine/prefill_task.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "server/base/status.h"
#include "server/engine/threshold_ladder.h"

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

std::vector<int32_t> LogitRows(std::vector<int32_t> logit_positions,
                               int32_t num_tokens) {
  logit_positions.push_back(num_tokens - 1);
  return logit_positions;
}

int64_t LogitScratchBytes(const Model& model) {
  return 2 * static_cast<int64_t>(sizeof(float)) * model.config().vocab_size;
}

CostKey PrefillCostKey(const ServedModel& model, const AttentionOptions& attention,
                       std::span<const float> head_thresholds) {
  // What requests bring themselves is one kind of work, or the keys would have no end.
  const bool of_profile =
      std::any_of(model.profiles.begin(), model.profiles.end(), [&](const Profile& p) {
        return p.head_thresholds.data() == head_thresholds.data();
      });
  const bool has_rung = HasThreshold(attention.method) && head_thresholds.empty();
  return {.model = &model,
          .head_thresholds = head_thresholds.empty() ? nullptr
                             : of_profile            ? head_thresholds.data()
                                                     : static_cast<const void*>(&model),
          .method = attention.method,
          .dtype = model.model().kv_dtype(),
          .head_dim = model.model().config().head_dim,
          .rung = has_rung ? RungOf(attention.threshold) : 0};
}

Work PrefillWork(int32_t num_tokens) {
  const double tokens = num_tokens;
  return {tokens, tokens * tokens};
}

bool MayShareRun(const BatchLimits& limits, int32_t num_tokens,
                 const AttentionOptions& attention) {
  return num_tokens <= limits.prompt_tokens_max && num_tokens < limits.tokens_max &&
         !attention.use_given_order && !attention.use_given_lists &&
         attention.coverage_rows == 0;
}

PrefillTask::PrefillTask(const Parts& parts, PrefillJob job, PrefillListener& listener)
    : parts_(parts),
      job_(std::move(job)),
      plan_(std::exchange(job_.reservation.plan, std::nullopt)),
      attention_(plan_->problem.attention),
      head_thresholds_(plan_->problem.head_thresholds),
      listener_(listener) {}

int32_t PrefillTask::batch_tokens() const {
  const auto tokens = static_cast<int32_t>(job_.tokens.size());
  if (!job_.kv->queries().layers().empty()) return 0;
  return MayShareRun(parts_.batch, tokens, attention_) ? tokens : 0;
}

BatchKey PrefillTask::batch_key() const {
  return {&parts_.model, attention_, head_thresholds_.data()};
}

bool PrefillTask::RunWith(std::span<Job* const> others) {
  std::vector<PrefillTask*> tasks = {this};
  // Jobs of this one's key are of its class.
  for (Job* other : others) tasks.push_back(static_cast<PrefillTask*>(other));
  PrefillProblem shared = {
      .num_tokens = 0, .attention = attention_, .head_thresholds = head_thresholds_};
  std::vector<int32_t> first_logit_rows;
  GroupBytes charged;
  Work work;
  for (const PrefillTask* task : tasks) {
    const PrefillProblem& own = task->plan_->problem;
    first_logit_rows.push_back(static_cast<int32_t>(shared.logit_rows.size()));
    for (int32_t row : own.logit_rows) {
      shared.logit_rows.push_back(shared.num_tokens + row);
    }
    shared.num_tokens += own.num_tokens;
    shared.prompt_tokens.push_back(own.num_tokens);
    charged.host +=
        task->job_.reservation.host.bytes() - LogitScratchBytes(parts_.model);
    charged.device += task->job_.reservation.device.bytes();
    work.linear += PrefillWork(own.num_tokens).linear;
    work.quadratic += PrefillWork(own.num_tokens).quadratic;
  }
  auto plan = PlanPrefill(parts_.model, std::move(shared));
  if (!plan.ok()) return false;
  const GroupBytes needed = BytesOfGroup(parts_.model, *plan, true);
  if (needed.host > charged.host || needed.device > charged.device) return false;

  std::vector<PrefillGroup::Prompt*> prompts;
  std::vector<JobReservation> reservations;
  for (PrefillTask* task : tasks) {
    prompts.push_back(task);
    reservations.push_back(std::move(task->job_.reservation));
  }
  const auto group =
      std::make_shared<PrefillGroup>(parts_.model, *std::move(plan), std::move(prompts),
                                     std::move(reservations), parts_.clock);
  for (size_t i = 0; i < tasks.size(); ++i) {
    tasks[i]->group_ = group;
    tasks[i]->first_logit_row_ = first_logit_rows[i];
    tasks[i]->run_work_ = work;
  }
  return true;
}

void PrefillTask::RunAlone() {
  run_work_ = PrefillWork(plan_->problem.num_tokens);
  std::vector<JobReservation> reservations;
  reservations.push_back(std::move(job_.reservation));
  group_ = std::make_shared<PrefillGroup>(parts_.model, *std::move(plan_),
                                          std::vector<PrefillGroup::Prompt*>{this},
                                          std::move(reservations), parts_.clock);
}

void PrefillTask::Start(const JobTiming& timing) {
  timing_ = timing;
  result_.stages.queue = absl::ToDoubleSeconds(timing.started - timing.admitted);
  if (group_ == nullptr) RunAlone();
}

absl::StatusOr<StepResult> PrefillTask::Step(const RunControl& control) {
  PBS_ABSL_RETURN_IF_ERROR(group_->RunLayer(control));
  if (group_->size() == 1) PBS_ABSL_RETURN_IF_ERROR(status_);
  const double layers = parts_.model.config().num_layers;
  return StepResult{group_->done(), group_->layers_done() / layers};
}

void PrefillTask::SetAside() { group_->SetAside(); }

void PrefillTask::OnHeld(int32_t layer) {
  if (layer == 0) result_.time_to_first_layer_seconds = SecondsSinceAdmission();
  job_.kv->Publish(layer + 1);
}

void PrefillTask::OnLayerDone(const LayerReport& report, bool is_first) {
  const AttentionStats& attention = report.attention;
  StageTimes& stages = result_.stages;
  stages.qkv += report.qkv_seconds;
  stages.permute += attention.permute_seconds;
  stages.select += attention.select_seconds;
  stages.attend += attention.attend_seconds;
  stages.mlp += report.mlp_seconds;
  result_.layers.push_back(attention);
  if (attention.coverage_rows > 0) result_.layer_heads.push_back(report.heads);
  if (is_first) {
    parts_.metrics.flops_computed.Increment(attention.executed_flops);
    parts_.metrics.flops_dense.Increment(attention.dense_flops);
    parts_.metrics.Density(attention.method_run).Observe(attention.Density());
  }
  listener_.OnLayerDone(report.layer, attention.Density(), report.seconds);
}

void PrefillTask::OnLogits() {
  result_.stages.embed = group_->embed_seconds();
  status_ = ReadResult();
}

void PrefillTask::OnRunDone(bool is_first) {
  result_.stages.copy = group_->copy_wait_seconds();
  result_.kv_copy_seconds = group_->copy_seconds();
  if (is_first) MeasureRun();
  if (!status_.ok()) return;
  job_.kv->writable_cache().set_num_tokens(static_cast<int32_t>(job_.tokens.size()));
  result_.total_seconds = SecondsSinceAdmission();
  Measure();
}

absl::Status PrefillTask::ReadResult() {
  const absl::Time begin = parts_.clock.Now();
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
                                  std::vector<TokenScore>* best) {
  PBS_ABSL_RETURN_IF_ERROR(group_->ReadLogits(first_logit_row_ + row, logits));
  if (!AllFinite(logits)) {
    return absl::InternalError("the model's logits are not finite");
  }
  *best = TopTokens(logits, job_.top_logits);
  return absl::OkStatus();
}

void PrefillTask::Measure() {
  const EngineMetrics& metrics = parts_.metrics;
  metrics.prefill_time.Observe(
      absl::ToDoubleSeconds(parts_.clock.Now() - timing_.started));
  metrics.time_to_first_layer.Observe(result_.time_to_first_layer_seconds);
  metrics.time_to_kv_ready.Observe(result_.total_seconds);
  metrics.prompt_tokens.Increment(static_cast<double>(job_.tokens.size()));
  metrics.StageTime(Stage::kQueue).Observe(result_.stages.queue);
  double coverage = 0;
  for (const AttentionStats& layer : result_.layers) coverage += layer.coverage;
  if (result_.layers.front().coverage_rows > 0) {
    metrics.coverage.Observe(coverage / static_cast<double>(result_.layers.size()));
  }
}

void PrefillTask::MeasureRun() {
  const StageTimes& stages = result_.stages;
  const std::pair<Stage, double> observed[] = {
      {Stage::kEmbed, stages.embed},     {Stage::kQkv, stages.qkv},
      {Stage::kPermute, stages.permute}, {Stage::kSelect, stages.select},
      {Stage::kAttend, stages.attend},   {Stage::kMlp, stages.mlp}};
  for (const auto& [stage, seconds] : observed) {
    if (seconds > 0) parts_.metrics.StageTime(stage).Observe(seconds);
  }
  parts_.metrics.batch_requests.Observe(static_cast<double>(group_->size()));
  parts_.costs.Measure(PrefillCostKey(*job_.model, attention_, head_thresholds_),
                       run_work_, {LinearSeconds(stages), AttentionSeconds(stages)},
                       parts_.clock.Now());
}

double PrefillTask::SecondsSinceAdmission() const {
  return absl::ToDoubleSeconds(parts_.clock.Now() - timing_.admitted);
}

void PrefillTask::Finish(const absl::Status& status) {
  if (group_ != nullptr) group_->Leave(*this);
  group_.reset();
  const std::shared_ptr<HeldKv> kv = std::move(job_.kv);
  const auto num_tokens = static_cast<double>(job_.tokens.size());
  job_ = PrefillJob();
  const absl::Status outcome = status.ok() ? status_ : status;
  if (status.ok() && !status_.ok()) {
    parts_.metrics.TokensWasted(WasteReason::kError).Increment(num_tokens);
  }
  kv->Finish(outcome);
  if (outcome.ok()) {
    listener_.OnDone(std::move(result_));
  } else {
    listener_.OnDone(outcome);
  }
}

}  // namespace pbs::server
