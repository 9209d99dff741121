#include "cpu/cpu_attention.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "common/score_rounding.h"
#include "cpu/attention_run.h"
#include "pbs/check.h"

namespace pbs::cpu {
namespace {

// Adds the wall seconds since the last lap to a stage.
class Stopwatch {
 public:
  void Lap(double& stage) {
    const auto now = std::chrono::steady_clock::now();
    stage += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void CopyGivenLists(AttentionRun& run) {
  const AttentionGeometry& g = run.plan.geometry;
  for (const Unit& unit : run.plan.units) {
    if (!unit.sparse) continue;
    for (int32_t member = 0; member < run.plan.num_members; ++member) {
      const int32_t head = run.QueryHead(unit, member);
      for (int32_t i = 0; i < run.Sequence(unit).num_query_blocks; ++i) {
        const auto row = run.tensors.lists.Row(g.ListRow(unit.sequence, head, i));
        std::copy(row.begin(), row.end(), run.ListEntries(unit, head, i));
        run.ListCount(unit, head, i) = static_cast<uint16_t>(row.size());
      }
    }
  }
}

// False when the run was stopped or met scores that are not finite.
bool RunWave(AttentionRun& run, const Wave& wave, double* times) {
  const auto healthy = [&run] { return !run.Stopped() && !run.non_finite; };
  Stopwatch watch;
  ScoreAndSortKeys(run, wave);
  if (!healthy()) return false;
  PackOperands(run, wave);
  watch.Lap(times[0]);
  SelectBlocks(run, wave);
  if (!healthy()) return false;
  GuardCoverage(run, wave);
  FallBackToDense(run, wave);
  PackMeans(run, wave);
  watch.Lap(times[1]);
  Attend(run, wave);
  watch.Lap(times[2]);
  MeasureCoverage(run, wave);
  return healthy();
}

}  // namespace

const TileKernels& KernelsFor(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
    case Isa::kScalar:
      break;
  }
  return kScalarKernels;
}

CpuAttention::CpuAttention(ThreadPool& pool, Isa isa, bool use_pairs)
    : pool_(pool),
      kernels_(KernelsFor(isa)),
      use_pairs_(use_pairs && KernelsFor(isa).gemm_pairs != nullptr) {
  PBS_CHECK(IsSupported(isa));
}

StatusOr<std::unique_ptr<AttentionPlan>> CpuAttention::Plan(
    const AttentionProblem& problem) const {
  PBS_RETURN_IF_ERROR(ValidateProblem(problem));
  // A block of 16 keys is half a vector of pairs.
  const bool pairs = use_pairs_ && problem.dtype == DType::kBF16 &&
                     problem.options.block_size >= 2 * kLanePad;
  const OperandFormat format = {.dtype = problem.dtype, .pairs = pairs};
  return StatusOr<std::unique_ptr<AttentionPlan>>(
      MakeCpuPlan(problem, format, pool_.num_threads()));
}

Status CpuAttention::Run(const AttentionPlan& plan, const AttentionTensors& tensors,
                         Workspace workspace, const RunControl& control) {
  const auto& cpu_plan = static_cast<const CpuAttentionPlan&>(plan);
  if (workspace.bytes < plan.workspace_bytes) {
    return ResourceExhausted("workspace of " + std::to_string(workspace.bytes) +
                             " bytes is smaller than the planned " +
                             std::to_string(plan.workspace_bytes));
  }
  PBS_RETURN_IF_ERROR(ValidateHeadThresholds(plan.problem, tensors.head_thresholds));
  AttentionRun run{.plan = cpu_plan,
                   .tensors = tensors,
                   .workspace = static_cast<std::byte*>(workspace.data),
                   .kernels = kernels_,
                   .pool = pool_,
                   .stop = control.stop};
  std::fill_n(run.At<uint8_t>(cpu_plan.unit_dense_at), cpu_plan.units.size(), 0);
  if (plan.problem.options.coverage_min > 0) {
    std::fill_n(
        run.At<uint8_t>(cpu_plan.guarded_at),
        plan.geometry.sequences.size() * static_cast<size_t>(plan.geometry.num_heads),
        0);
  }
  auto* times = run.At<double>(cpu_plan.times_at);
  std::fill_n(times, 3, 0.0);
  if (plan.problem.options.use_given_lists) CopyGivenLists(run);
  for (const Wave& wave : cpu_plan.waves) {
    if (RunWave(run, wave, times)) continue;
    if (run.non_finite) {
      return ScoreOverflow(plan.problem);
    }
    return Cancelled("attention stopped by its caller");
  }
  return OkStatus();
}

Status CpuAttention::ReadReport(const AttentionPlan& plan, Workspace workspace,
                                const ReportRequest& request, AttentionReport* report) {
  PBS_CHECK(under_way_.empty());
  FillReport(static_cast<const CpuAttentionPlan&>(plan),
             static_cast<const std::byte*>(workspace.data), request, report);
  return OkStatus();
}

Status CpuAttention::StartReport(const AttentionPlan& plan, Workspace workspace) {
  PBS_CHECK(under_way_.size() < kReportsUnderWayMax);
  FillReport(static_cast<const CpuAttentionPlan&>(plan),
             static_cast<const std::byte*>(workspace.data), {},
             &under_way_.emplace_back());
  return OkStatus();
}

Status CpuAttention::FinishReport(const AttentionPlan&, AttentionReport* report) {
  PBS_CHECK(!under_way_.empty());
  *report = std::move(under_way_.front());
  under_way_.pop_front();
  return OkStatus();
}

}  // namespace pbs::cpu
