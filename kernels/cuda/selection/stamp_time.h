// When stages begin: events between kernels would keep them apart.
#pragma once

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

// In the first kernel of a stage; null: it is not that.
PBS_DEVICE void StampTime(int64_t* at) {
  if (at != nullptr && BlockIndex() == 0 && ThreadIndex() == 0) {
    StoreGlobal(at, GlobalTimer());
  }
}

}  // namespace pbs::cuda
