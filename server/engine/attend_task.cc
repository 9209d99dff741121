#include "server/engine/attend_task.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "server/base/status.h"

namespace pbs::server {
namespace {

int64_t ListBytes(const AttentionGeometry& geometry) {
  const int64_t rows = geometry.total_query_blocks * geometry.num_heads;
  return rows * static_cast<int64_t>(sizeof(int64_t) + 2 * sizeof(uint16_t)) +
         geometry.total_entries * static_cast<int64_t>(sizeof(uint16_t));
}

int64_t OrderBytes(const AttentionGeometry& geometry) {
  return geometry.num_order_heads * geometry.total_k *
         static_cast<int64_t>(sizeof(int32_t));
}

int64_t OutputBytes(const AttentionGeometry& geometry, DType dtype) {
  return geometry.num_heads * geometry.total_q * geometry.head_dim * DTypeBytes(dtype);
}

int64_t LseBytes(const AttentionGeometry& geometry) {
  return geometry.num_heads * geometry.total_q * static_cast<int64_t>(sizeof(float));
}

int64_t HeldBytes(const AttentionReport& report) {
  const BlockLists& lists = report.lists;
  return static_cast<int64_t>(report.order.size() * sizeof(int32_t) +
                              lists.begin.size() * sizeof(int64_t) +
                              lists.count.size() * sizeof(uint16_t) +
                              lists.num_masked.size() * sizeof(uint16_t) +
                              lists.indices.size() * sizeof(uint16_t));
}

}  // namespace

AttendBytes BytesOfAttend(const AttentionPlan& plan, const AttendWanted& wanted) {
  const AttentionGeometry& g = plan.geometry;
  const AttentionProblem& problem = plan.problem;
  const int64_t keys = g.num_kv_heads * g.total_k * g.head_dim;
  const bool given_order = problem.options.use_given_order;
  const bool given_lists = problem.options.use_given_lists;

  AttendBytes bytes;
  bytes.inputs = OutputBytes(g, problem.dtype) + 2 * keys * DTypeBytes(problem.dtype) +
                 (given_order ? OrderBytes(g) : 0) + (given_lists ? ListBytes(g) : 0);
  bytes.workspace = plan.workspace_bytes;
  bytes.outputs = OutputBytes(g, problem.dtype) + (wanted.lse ? LseBytes(g) : 0) +
                  (wanted.order ? OrderBytes(g) : 0) +
                  (wanted.lists ? ListBytes(g) : 0);
  bytes.read_back = (wanted.order ? OrderBytes(g) : 0) +
                    (wanted.lists || given_lists ? ListBytes(g) : 0);
  return bytes;
}

int32_t NumRuns(const AttendJob& job) {
  return job.warmup + std::max(1, job.repetitions);
}

CostKey AttendCostKey(const AttentionProblem& problem) {
  return {.model = nullptr,
          .method = problem.options.method,
          .dtype = problem.dtype,
          .head_dim = problem.shape.head_dim};
}

Work AttendWork(const AttentionGeometry& geometry, int32_t runs) {
  double pairs = 0;
  for (const SequenceGeometry& s : geometry.sequences) {
    pairs += static_cast<double>(s.q_len) * (s.query_offset + 0.5 * (s.q_len + 1.0));
  }
  return {0, pairs * geometry.num_heads * geometry.head_dim * runs};
}

AttendTask::AttendTask(const Parts& parts, AttendJob job, AttendListener& listener)
    : parts_(parts),
      job_(std::move(job)),
      plan_(std::move(job_.reservation.plan)),
      listener_(listener),
      num_runs_(NumRuns(job_)) {
  inputs_.q = {job_.q.bytes.data(), job_.q.layout};
  inputs_.k = {job_.k.bytes.data(), job_.k.layout};
  inputs_.v = {job_.v.bytes.data(), job_.v.layout};
  if (job_.problem.options.use_given_order) {
    inputs_.order = {job_.order.bytes.data(), job_.order.layout};
  }
  if (job_.problem.options.use_given_lists) inputs_.lists = job_.lists.View();
  if (parts_.uploads != nullptr) {
    upload_ = parts_.uploads->Add(TakeInputs(), CopiesOfInputs(*plan_, inputs_));
  }
}

// They stay where they are.
UploadSource AttendTask::TakeInputs() {
  const int64_t bytes = BytesOfAttend(*plan_, {}).inputs;
  const auto split = [bytes](ByteReservation& all) {
    return all.Split(std::min(bytes, all.bytes()));
  };
  UploadSource source;
  source.reservation = {split(job_.reservation.host), split(job_.reservation.device)};
  source.q = std::move(job_.q.bytes);
  source.k = std::move(job_.k.bytes);
  source.v = std::move(job_.v.bytes);
  source.order = std::move(job_.order.bytes);
  source.lists = std::move(job_.lists);
  return source;
}

void AttendTask::Start(const JobTiming& timing) {
  result_.stages.queue = absl::ToDoubleSeconds(timing.started - timing.admitted);
}

absl::Status AttendTask::Allocate(const RunControl& control) {
  const AttentionGeometry& g = plan_->geometry;
  PBS_ABSL_ASSIGN_OR_RETURN(result_.o,
                            HostBytes::Allocate(OutputBytes(g, job_.problem.dtype)));
  if (job_.wanted.lse) {
    PBS_ABSL_ASSIGN_OR_RETURN(result_.lse, HostBytes::Allocate(LseBytes(g)));
  }
  PBS_ABSL_ASSIGN_OR_RETURN(workspace_,
                            ToAbsl(parts_.backend.Allocate(plan_->workspace_bytes)));
  if (parts_.uploads == nullptr) return absl::OkStatus();
  PBS_ABSL_ASSIGN_OR_RETURN(const auto inputs, parts_.uploads->Wait(upload_, control));
  PBS_ABSL_ASSIGN_OR_RETURN(
      device_, DeviceTensors::Create(*plan_, HostTensors(), inputs, parts_.backend));
  return absl::OkStatus();
}

AttentionTensors AttendTask::HostTensors() {
  AttentionTensors tensors = inputs_;
  tensors.o = {result_.o.data(), job_.o_layout};
  if (job_.wanted.lse) tensors.lse = {result_.lse.data(), job_.lse_layout};
  return tensors;
}

absl::StatusOr<StepResult> AttendTask::Step(const RunControl& control) {
  if (runs_done_ == 0) PBS_ABSL_RETURN_IF_ERROR(Allocate(control));
  const bool is_last = runs_done_ + 1 == num_runs_;
  PBS_ABSL_RETURN_IF_ERROR(RunOnce(control, is_last));
  ++runs_done_;
  if (is_last) Measure();
  return StepResult{.done = is_last,
                    .progress = static_cast<double>(runs_done_) / num_runs_};
}

absl::Status AttendTask::RunOnce(const RunControl& control, bool is_last) {
  PBS_ABSL_RETURN_IF_ERROR(
      ToAbsl(parts_.backend.Run(*plan_, device_ ? device_->tensors() : HostTensors(),
                                workspace_.workspace(), control)));
  const ReportRequest request = {.order = is_last && job_.wanted.order,
                                 .lists = is_last && job_.wanted.lists};
  AttentionReport report;
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(
      parts_.backend.ReadReport(*plan_, workspace_.workspace(), request, &report)));
  const AttentionStats& stats = report.stats;
  run_seconds_ += stats.permute_seconds + stats.select_seconds + stats.attend_seconds;
  parts_.metrics.flops_computed.Increment(stats.executed_flops);
  parts_.metrics.flops_dense.Increment(stats.dense_flops);
  if (runs_done_ >= job_.warmup) {
    result_.iterations.push_back({.permute_seconds = stats.permute_seconds,
                                  .select_seconds = stats.select_seconds,
                                  .attend_seconds = stats.attend_seconds});
  }
  if (!is_last) return absl::OkStatus();
  result_.report = std::move(report);
  return device_ ? device_->Download(HostTensors(), parts_.backend) : absl::OkStatus();
}

void AttendTask::Measure() {
  const AttentionStats& stats = result_.report.stats;
  StageTimes& stages = result_.stages;
  stages.permute = stats.permute_seconds;
  stages.select = stats.select_seconds;
  stages.attend = stats.attend_seconds;

  const EngineMetrics& metrics = parts_.metrics;
  metrics.StageTime(Stage::kQueue).Observe(stages.queue);
  if (stages.permute > 0) metrics.StageTime(Stage::kPermute).Observe(stages.permute);
  if (stages.select > 0) metrics.StageTime(Stage::kSelect).Observe(stages.select);
  metrics.StageTime(Stage::kAttend).Observe(stages.attend);
  metrics.Density(stats.method_run).Observe(stats.Density());
  if (stats.coverage_rows > 0) metrics.coverage.Observe(stats.coverage);

  parts_.costs.Measure(AttendCostKey(job_.problem),
                       AttendWork(plan_->geometry, num_runs_), {0, run_seconds_},
                       parts_.clock.Now());
}

void AttendTask::Finish(const absl::Status& status) {
  workspace_ = Buffer();
  device_.reset();
  upload_.reset();
  AttendListener& listener = listener_;
  job_.reservation.device.Reset();
  ByteReservation reservation = std::move(job_.reservation.host);
  job_ = AttendJob();
  if (!status.ok()) {
    result_ = AttendResult();
    reservation.Reset();
    listener.OnDone(status);
    return;
  }
  const int64_t held =
      result_.o.size() + result_.lse.size() + HeldBytes(result_.report);
  reservation.ShrinkTo(std::min(held, reservation.bytes()));
  result_.reservation = std::move(reservation);
  listener.OnDone(std::move(result_));
}

}  // namespace pbs::server
