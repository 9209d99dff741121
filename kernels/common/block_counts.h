// Counts of executed blocks, shared by kernels on a device and reports on the host.
#pragma once

#include <cstdint>

namespace pbs {

// Counts of one query head, over all sequences.
struct BlockCounts {
  int64_t executed = 0;
  int64_t lower = 0;  // those on or below the diagonal
};

}  // namespace pbs
