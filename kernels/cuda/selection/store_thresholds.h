// Writes the thresholds of query heads to the device from kernel parameters, so that a
// run need not wait for a copy from host memory.
#pragma once

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

constexpr int32_t kThresholdsPerStore = 512;  // parameters hold 4 KiB

struct StoredThresholds {
  float values[kThresholdsPerStore];
  float* target;  // of the first
  int32_t count;
};

// Grid [1].
struct StoreThresholds {
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const StoredThresholds& stored) {
    for (int i = ThreadIndex(); i < stored.count; i += kThreads) {
      StoreGlobal(stored.target + i, stored.values[i]);
    }
  }
};

}  // namespace pbs::cuda
