// Records when stages begin. Events between kernels would prevent their overlap.
#pragma once

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

// Writes the time. `at` is null except in the first kernel of a stage.
PBS_DEVICE void StampTime(int64_t* at) {
  if (at != nullptr && BlockIndex() == 0 && ThreadIndex() == 0) {
    StoreGlobal(at, GlobalTimer());
  }
}

}  // namespace pbs::cuda
