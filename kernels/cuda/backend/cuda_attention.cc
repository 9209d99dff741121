#include "cuda/backend/cuda_attention.h"

#include <algorithm>
#include <vector>

#include "cuda/plan/cuda_plan.h"
#include "cuda/plan/cuda_report.h"

namespace pbs::cuda {

StatusOr<std::unique_ptr<CudaAttention>> CudaAttention::Create(Driver& driver,
                                                               StagedCopies& copies) {
  std::unique_ptr<CudaAttention> attention(new CudaAttention(driver, copies));
  for (EventId& mark : attention->marks_) {
    PBS_ASSIGN_OR_RETURN(mark, driver.CreateEvent());
  }
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
  PBS_RETURN_IF_ERROR(MarkTime(kBegin));
  PBS_RETURN_IF_ERROR(driver_.OrderKeys(cuda_plan, run));
  PBS_RETURN_IF_ERROR(MarkTime(kPermuted));
  PBS_RETURN_IF_ERROR(driver_.MakeLists(cuda_plan, run));
  PBS_RETURN_IF_ERROR(MarkTime(kSelected));
  PBS_RETURN_IF_ERROR(driver_.Attend(cuda_plan, run));
  return MarkTime(kAttended);
}

Status CudaAttention::ReadReport(const AttentionPlan& plan, Workspace workspace,
                                 const ReportRequest& request,
                                 AttentionReport* report) {
  const auto& cuda_plan = static_cast<const CudaAttentionPlan&>(plan);
  // Only the regions of a report are read: a copy of all would hold permuted keys too.
  const auto regions = ReportRegions(cuda_plan, request);
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
  PBS_RETURN_IF_ERROR(FillCudaReport(cuda_plan, host.data(), request, report));
  const auto seconds = [this](Mark from, Mark to) {
    return driver_.SecondsBetween(marks_[from], marks_[to]);
  };
  AttentionStats& stats = report->stats;
  PBS_ASSIGN_OR_RETURN(stats.permute_seconds, seconds(kBegin, kPermuted));
  PBS_ASSIGN_OR_RETURN(stats.select_seconds, seconds(kPermuted, kSelected));
  PBS_ASSIGN_OR_RETURN(stats.attend_seconds, seconds(kSelected, kAttended));
  return OkStatus();
}

}  // namespace pbs::cuda
