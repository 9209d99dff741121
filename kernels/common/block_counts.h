// How many blocks ran: what kernels on a device and reports on the host share.
#pragma once

#include <cstdint>

namespace pbs {

// Of one query head, over all sequences.
struct BlockCounts {
  int64_t executed = 0;
  int64_t lower = 0;  // of them, on or below the diagonal
};

}  // namespace pbs
