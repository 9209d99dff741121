#include "cuda/backend/cuda_attention.h"

#include <algorithm>
#include <vector>

#include "cuda/plan/cuda_plan.h"
#include "cuda/plan/cuda_report.h"
#include "pbs/check.h"

namespace pbs::cuda {

StatusOr<std::unique_ptr<CudaAttention>> CudaAttention::Create(Driver& driver,
                                                               StagedCopies& copies) {
  std::unique_ptr<CudaAttention> attention(new CudaAttention(driver, copies));
  PBS_ASSIGN_OR_RETURN(attention->reports_, ReportSlots::Create(driver));
  return attention;
}

StatusOr<std::unique_ptr<AttentionPlan>> CudaAttention::Plan(
    const AttentionProblem& problem) const {
  auto plan = MakeCudaPlan(problem, driver_.info().traits);
  if (!plan.ok()) return plan.status();
  return std::unique_ptr<AttentionPlan>(*std::move(plan));
}

Status CudaAttention::Run(const AttentionPlan& plan, const AttentionTensors& tensors,
                          Workspace workspace, const RunControl& control) {
  if (control.stop != nullptr && control.stop->load(std::memory_order_relaxed)) {
    return Cancelled("attention stopped by its caller");
  }
  const auto& cuda_plan = static_cast<const CudaAttentionPlan&>(plan);
  PBS_ASSIGN_OR_RETURN(const RunParams run,
                       MakeRunParams(cuda_plan, tensors, workspace));
  PBS_RETURN_IF_ERROR(reports_->MarkBegin());
  PBS_RETURN_IF_ERROR(driver_.OrderKeys(cuda_plan, run));
  PBS_RETURN_IF_ERROR(driver_.MakeLists(cuda_plan, run));
  PBS_RETURN_IF_ERROR(driver_.Attend(cuda_plan, run));
  PBS_RETURN_IF_ERROR(driver_.CorrectOutputs(cuda_plan, run));
  PBS_RETURN_IF_ERROR(reports_->MarkEnd());
  return driver_.MeasureCoverage(cuda_plan, run);
}

Status CudaAttention::ReadReport(const AttentionPlan& plan, Workspace workspace,
                                 const ReportRequest& request,
                                 AttentionReport* report) {
  PBS_CHECK(reports_->under_way() == 0);
  PBS_RETURN_IF_ERROR(StartReport(plan, workspace));
  PBS_RETURN_IF_ERROR(FinishReport(plan, report));
  // Only the regions that are asked for: a copy of all would hold permuted keys too.
  const auto& cuda_plan = static_cast<const CudaAttentionPlan&>(plan);
  const auto regions = RegionsOf(cuda_plan, request);
  int64_t end = 0;
  for (const ReportRegion& region : regions) {
    end = std::max(end, region.offset + region.bytes);
  }
  std::vector<std::byte> host(static_cast<size_t>(end));
  for (const ReportRegion& region : regions) {
    PBS_RETURN_IF_ERROR(
        copies_.ToHost(static_cast<const std::byte*>(workspace.data) + region.offset,
                       host.data() + region.offset, region.bytes));
  }
  TellRequested(cuda_plan, host.data(), request, report);
  return OkStatus();
}

Status CudaAttention::StartReport(const AttentionPlan& plan, Workspace workspace) {
  const auto& cuda_plan = static_cast<const CudaAttentionPlan&>(plan);
  return reports_->Start(
      static_cast<const std::byte*>(workspace.data) + cuda_plan.summary_at,
      cuda_plan.summary_bytes);
}

Status CudaAttention::FinishReport(const AttentionPlan& plan, AttentionReport* report) {
  PBS_ASSIGN_OR_RETURN(const ReportSlots::Arrived arrived, reports_->Finish());
  return TellSummary(static_cast<const CudaAttentionPlan&>(plan), arrived.summary,
                     arrived.seconds, report);
}

}  // namespace pbs::cuda
