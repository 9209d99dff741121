#include "server/engine/device_engine.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "pbs/check.h"
#include "server/base/shared_region.h"
#include "server/base/status.h"
#include "server/engine/attend_task.h"
#include "server/engine/kv_window.h"
#include "server/engine/prefill_task.h"
#include "server/model/prefill.h"
#include "server/model/prefill_plan.h"

namespace pbs::server {
namespace {

absl::StatusOr<ByteReservation> Charge(ByteLedger& ledger, int64_t bytes) {
  absl::StatusOr<ByteReservation> charged = ledger.Reserve(bytes);
  if (!absl::IsInvalidArgument(charged.status())) return charged;
  return absl::OutOfRangeError(charged.status().message());
}

// The memory of a region, which outlives the buffer.
Buffer BufferOver(const SharedRegion& region) {
  const std::span<std::byte> bytes = region.bytes();
  return {bytes.data(), static_cast<int64_t>(bytes.size()),
          [](void*, void*, int64_t) {}, nullptr};
}

}  // namespace

DeviceEngine::DeviceEngine(const EngineOptions& options, const EngineParts& parts)
    : parts_(parts),
      batch_(options.batch),
      shared_caches_(options.shared_caches),
      executor_({.queue_requests_max = options.queue_requests_max,
                 .yield_share = options.yield_share,
                 .batch_tokens_max = options.batch.tokens_max},
                parts.clock, parts.timers, parts.metrics.engine) {
  PBS_CHECK(has_device_memory() != parts_.backend.info().host_memory);
  PBS_CHECK(!shared_caches_ || !has_device_memory());
  if (has_device_memory()) uploads_.emplace(parts_.backend);
  parts_.metrics.engine.memory_budget.Set(
      static_cast<double>(parts_.ledger.bytes_max()));
}

DeviceEngine::Load DeviceEngine::load() const {
  return {.backlog = executor_.backlog(),
          .device_bytes_held =
              has_device_memory() ? parts_.device_ledger->bytes_held() : 0};
}

// ---- raw attention

absl::StatusOr<AttendReservation> DeviceEngine::ReserveAttend(
    const AttentionProblem& problem, const AttendWanted& wanted) {
  AttendReservation reservation;
  PBS_ABSL_ASSIGN_OR_RETURN(reservation.plan, ToAbsl(parts_.backend.Plan(problem)));
  const AttendBytes bytes = BytesOfAttend(*reservation.plan, wanted);
  reservation.replica = parts_.replica;
  if (has_device_memory()) {
    PBS_ABSL_ASSIGN_OR_RETURN(reservation.device,
                              Charge(*parts_.device_ledger, bytes.Total()));
  }
  const int64_t host =
      has_device_memory() ? bytes.Tensors() + bytes.read_back : bytes.Total();
  PBS_ABSL_ASSIGN_OR_RETURN(reservation.host, Charge(parts_.ledger, host));
  return reservation;
}

absl::StatusOr<Admission> DeviceEngine::SubmitAttend(AttendJob job,
                                                     AttendListener& listener) {
  PBS_CHECK(job.reservation.plan != nullptr);
  const JobTerms terms = job.terms;
  JobSize size;
  size.prediction = parts_.costs.Predict(
      AttendCostKey(job.problem),
      AttendWork(job.reservation.plan->geometry, NumRuns(job)), parts_.clock.Now());
  size.num_steps = NumRuns(job);
  const AttendTask::Parts task_parts = {parts_.backend, parts_.costs,
                                        parts_.metrics.engine, parts_.clock,
                                        uploads_ ? &*uploads_ : nullptr};
  auto task = std::make_unique<AttendTask>(task_parts, std::move(job), listener);
  const UploadId upload = uploads_ ? task->upload_id() : 0;
  absl::StatusOr<Admission> admission = executor_.Submit(terms, size, std::move(task));
  if (uploads_ && admission.ok()) uploads_->Begin(upload);
  return admission;
}

// ---- prefill

// The cache counts as held until its last owner lets go. shared_ptr: see held_kv.h.
absl::StatusOr<std::shared_ptr<HeldKv>> DeviceEngine::Hold(const KvShape& shape,
                                                           CapturedQueries queries,
                                                           ByteReservation bytes) {
  std::unique_ptr<SharedRegion> region;
  if (shared_caches_) {
    PBS_ABSL_ASSIGN_OR_RETURN(region, SharedRegion::Create(shape.bytes()));
  }
  PBS_ABSL_ASSIGN_OR_RETURN(
      KvCache cache,
      ToAbsl(region == nullptr ? KvCache::CreateOnHost(shape, parts_.backend)
                               : KvCache::CreateIn(shape, BufferOver(*region))));
  prometheus::Gauge& gauge = parts_.metrics.kv.Held(Tier::kHost);
  const auto held = static_cast<double>(bytes.bytes());
  gauge.Increment(held);
  return std::shared_ptr<HeldKv>(new HeldKv(std::move(cache), std::move(bytes),
                                            std::move(queries), std::move(region)),
                                 [&gauge, held](HeldKv* kv) {
                                   delete kv;
                                   gauge.Decrement(held);
                                 });
}

const Model& DeviceEngine::ReplicaOf(const ServedModel& served) const {
  const Model& model = *served.replicas.at(static_cast<size_t>(parts_.replica));
  PBS_CHECK(&model.backend() == &parts_.backend);
  return model;
}

absl::StatusOr<PrefillReservation> DeviceEngine::ReservePrefill(
    const ServedModel& served, const PrefillNeeds& needs) {
  const Model& model = ReplicaOf(served);
  PBS_ABSL_ASSIGN_OR_RETURN(
      PrefillPlan plan,
      ToAbsl(PlanPrefill(
          model, {.num_tokens = needs.num_tokens,
                  .attention = needs.attention,
                  .logit_rows = LogitRows(needs.logit_positions, needs.num_tokens),
                  .head_thresholds = needs.head_thresholds})));
  const KvShape shape = model.kv_shape(needs.num_tokens);
  const QueryShape query_shape = model.query_shape(needs.num_tokens);
  const int64_t held_bytes =
      shape.bytes() + CapturedQueries::BytesOf(query_shape, needs.query_layers.size());
  PrefillReservation reservation;
  reservation.workspace.replica = parts_.replica;
  const bool may_share = needs.query_layers.empty() &&
                         MayShareRun(batch_, needs.num_tokens, needs.attention);
  const GroupBytes bytes = BytesOfGroup(model, plan, may_share);
  reservation.workspace.plan = std::move(plan);
  const int64_t workspace = bytes.host + LogitScratchBytes(model);
  if (has_device_memory()) {
    PBS_ABSL_ASSIGN_OR_RETURN(reservation.workspace.device,
                              Charge(*parts_.device_ledger, bytes.device));
  }
  // One charge for all, so that two requests cannot each hold half of what they need,
  // and one that could never fit is told so.
  PBS_ABSL_ASSIGN_OR_RETURN(
      ByteReservation all,
      Charge(parts_.ledger, held_bytes + workspace + needs.reply_bytes));
  reservation.workspace.host = all.Split(workspace);
  reservation.reply = all.Split(needs.reply_bytes);
  PBS_ABSL_ASSIGN_OR_RETURN(
      CapturedQueries queries,
      ToAbsl(CapturedQueries::Create(query_shape, needs.query_layers, parts_.backend)));
  PBS_ABSL_ASSIGN_OR_RETURN(reservation.kv,
                            Hold(shape, std::move(queries), std::move(all)));
  return reservation;
}

JobSize DeviceEngine::SizeOfPrefill(const ServedModel& model, int32_t num_tokens,
                                    const AttentionOptions& attention,
                                    std::span<const float> head_thresholds) const {
  JobSize size;
  size.prompt_tokens = num_tokens;
  size.prediction =
      parts_.costs.Predict(PrefillCostKey(model, attention, head_thresholds),
                           PrefillWork(num_tokens), parts_.clock.Now());
  size.num_steps = model.model().config().num_layers;
  size.steps_under_way = PrefillRun::LayersUnderWayMax(parts_.backend);
  return size;
}

std::optional<double> DeviceEngine::PredictPrefill(
    const ServedModel& model, int32_t num_tokens, const AttentionOptions& attention,
    std::span<const float> head_thresholds, const JobTerms& terms) const {
  return executor_.Predict(
      terms, SizeOfPrefill(model, num_tokens, attention, head_thresholds));
}

absl::StatusOr<Admission> DeviceEngine::SubmitPrefill(PrefillJob job,
                                                      PrefillListener& listener) {
  const Model& model = ReplicaOf(*job.model);
  PBS_CHECK(job.reservation.plan.has_value());
  const PrefillProblem& problem = job.reservation.plan->problem;
  const auto num_tokens = static_cast<int32_t>(job.tokens.size());
  if (problem.num_tokens != num_tokens ||
      problem.logit_rows != LogitRows(job.logit_positions, num_tokens)) {
    return absl::InternalError("the prefill was reserved with another shape");
  }
  const JobTerms terms = job.terms;
  const JobSize size =
      SizeOfPrefill(*job.model, num_tokens, problem.attention, problem.head_thresholds);
  const PrefillTask::Parts task_parts = {model, parts_.costs, parts_.metrics.engine,
                                         parts_.clock, batch_};
  const std::shared_ptr<HeldKv> kv = job.kv;
  absl::StatusOr<Admission> admission = executor_.Submit(
      terms, size, std::make_unique<PrefillTask>(task_parts, std::move(job), listener));
  // Whoever follows the cache already must not wait for layers that will never come.
  if (!admission.ok()) kv->Finish(admission.status());
  return admission;
}

}  // namespace pbs::server
