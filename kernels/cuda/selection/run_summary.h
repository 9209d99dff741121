// What a run leaves for its report, in one piece: one small copy tells it all.
#pragma once

#include <cstdint>

#include "common/block_counts.h"

namespace pbs::cuda {

// The begin of the summary. Behind it lie, where the plan has them: BlockCounts
// [num_heads]; int32 [num_order_heads, num_sequences], 1 where an order head fell back
// to dense; CoverageParams::coverage.
struct RunSummary {
  // The device's clock in nanoseconds: when the first kernel began, when keys were in
  // place, when tiles were there.
  int64_t began;
  int64_t ordered;
  int64_t listed;
  int32_t non_finite;  // 1: a score is not
  int32_t padding;
};

}  // namespace pbs::cuda
