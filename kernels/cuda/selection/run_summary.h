// The data of a run for its report, in contiguous memory, so that one small copy is
// enough.
#pragma once

#include <cstdint>

#include "common/block_counts.h"

namespace pbs::cuda {

// The beginning of the summary. After it follow, if the plan has them: BlockCounts
// [num_heads]; int32 [num_order_heads, num_sequences], 1 where an order head fell back
// to dense; CoverageParams::coverage; GuardParams::guarded.
struct RunSummary {
  // Times of the device's clock in nanoseconds: begin of the first kernel, then the
  // times when keys were ordered and when tiles were complete.
  int64_t began;
  int64_t ordered;
  int64_t listed;
  int32_t non_finite;  // 1: a score is not finite
  int32_t padding;
};

}  // namespace pbs::cuda
