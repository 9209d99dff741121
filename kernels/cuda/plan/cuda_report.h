// What a finished run of the CUDA backend left in its workspace, once it is on the
// host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/plan/cuda_plan.h"
#include "pbs/attention.h"

namespace pbs::cuda {

// Bytes of the workspace that a report reads; a copy of each region at the same offset
// of `workspace` is all that FillCudaReport() looks at.
struct ReportRegion {
  int64_t offset = 0;
  int64_t bytes = 0;
};
std::vector<ReportRegion> ReportRegions(const CudaAttentionPlan& plan,
                                        const ReportRequest& request);

// InvalidArgument when finite inputs overflowed (pbs, mean_pooling). Fills everything
// but times.
Status FillCudaReport(const CudaAttentionPlan& plan, const std::byte* workspace,
                      const ReportRequest& request, AttentionReport* report);

}  // namespace pbs::cuda
