// Record of a wait that never ended (bounded_wait.h).
#pragma once

#include <cstdint>

namespace pbs::cuda {

struct HangRecord {
  int32_t hung;       // 1 when the other fields are set
  int32_t block;      // thread block
  int32_t warpgroup;  // 0: the producer
  int32_t barrier;    // offset in shared memory
  int32_t parity;     // the awaited parity
  int32_t tile;       // the tile of the thread block that the warpgroup had begun
};

}  // namespace pbs::cuda
