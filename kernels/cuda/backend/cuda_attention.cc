#include "cuda/backend/cuda_attention.h"

#include <algorithm>
#include <vector>

#include "cuda/plan/cuda_plan.h"
#include "cuda/plan/cuda_report.h"

namespace pbs::cuda {

StatusOr<std::unique_ptr<CudaAttention>> CudaAttention::Create(Driver& driver,
                                                               StagedCopies& copies) {
  std::unique_ptr<CudaAttention> attention(new CudaAttention(driver, copies));
  PBS_ASSIGN_OR_RETURN(attention->began_, driver.CreateEvent());
  PBS_ASSIGN_OR_RETURN(attention->attended_, driver.CreateEvent());
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
  PBS_RETURN_IF_ERROR(driver_.Record(began_, StreamId::kCompute));
  PBS_RETURN_IF_ERROR(driver_.OrderKeys(cuda_plan, run));
  PBS_RETURN_IF_ERROR(driver_.MakeLists(cuda_plan, run));
  PBS_RETURN_IF_ERROR(driver_.Attend(cuda_plan, run));
  return driver_.Record(attended_, StreamId::kCompute);
}

Status CudaAttention::ReadReport(const AttentionPlan& plan, Workspace workspace,
                                 const ReportRequest& request,
                                 AttentionReport* report) {
  const auto& cuda_plan = static_cast<const CudaAttentionPlan&>(plan);
  const auto* device = static_cast<const std::byte*>(workspace.data);
  std::vector<std::byte> summary(static_cast<size_t>(cuda_plan.summary_bytes));
  PBS_RETURN_IF_ERROR(copies_.ToHost(device + cuda_plan.summary_at, summary.data(),
                                     cuda_plan.summary_bytes));
  PBS_ASSIGN_OR_RETURN(const double seconds, driver_.SecondsBetween(began_, attended_));
  PBS_RETURN_IF_ERROR(TellSummary(cuda_plan, summary.data(), seconds, report));
  // Only the regions that are asked for: a copy of all would hold permuted keys too.
  const auto regions = RegionsOf(cuda_plan, request);
  int64_t end = 0;
  for (const ReportRegion& region : regions) {
    end = std::max(end, region.offset + region.bytes);
  }
  std::vector<std::byte> host(static_cast<size_t>(end));
  for (const ReportRegion& region : regions) {
    PBS_RETURN_IF_ERROR(copies_.ToHost(device + region.offset,
                                       host.data() + region.offset, region.bytes));
  }
  TellRequested(cuda_plan, host.data(), request, report);
  return OkStatus();
}

}  // namespace pbs::cuda
