// Reads the results of a finished run of the CUDA backend from a copy of its workspace
// on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/plan/cuda_plan.h"
#include "pbs/attention.h"

namespace pbs::cuda {

// Fills the statistics, of heads too, from a copy of the plan's summary_bytes.
// `total_seconds` is the time from before the first kernel to after attention.
// Attention's time is what remains after the stages before it. InvalidArgument when
// finite inputs overflowed (pbs, mean_pooling).
Status TellSummary(const CudaAttentionPlan& plan, const std::byte* summary,
                   double total_seconds, AttentionReport* report);

// A region of the workspace that order and lists are made of. TellRequested() adds both
// to a report; it reads only a copy of each region at the same offset of `workspace`.
struct ReportRegion {
  int64_t offset = 0;
  int64_t bytes = 0;
};
std::vector<ReportRegion> RegionsOf(const CudaAttentionPlan& plan,
                                    const ReportRequest& request);
void TellRequested(const CudaAttentionPlan& plan, const std::byte* workspace,
                   const ReportRequest& request, AttentionReport* report);

}  // namespace pbs::cuda
