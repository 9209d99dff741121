// What a finished run of the CUDA backend left in its workspace, once it is on the
// host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/plan/cuda_plan.h"
#include "pbs/attention.h"

namespace pbs::cuda {

// Fills the statistics and head_density from a copy of the plan's summary_bytes.
// `total_seconds`: from before the first kernel to behind attention; what the stages
// before attention leave of it is attention's. InvalidArgument when finite inputs
// overflowed (pbs, mean_pooling).
Status TellSummary(const CudaAttentionPlan& plan, const std::byte* summary,
                   double total_seconds, AttentionReport* report);

// Bytes of the workspace that order and lists are made of; a copy of each region at the
// same offset of `workspace` is all that TellRequested() looks at. It adds them to a
// report.
struct ReportRegion {
  int64_t offset = 0;
  int64_t bytes = 0;
};
std::vector<ReportRegion> RegionsOf(const CudaAttentionPlan& plan,
                                    const ReportRequest& request);
void TellRequested(const CudaAttentionPlan& plan, const std::byte* workspace,
                   const ReportRequest& request, AttentionReport* report);

}  // namespace pbs::cuda
