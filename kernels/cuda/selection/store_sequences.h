// Brings the plan's sequences to the device inside kernel parameters: no copy from host
// memory that a run would have to wait for.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

constexpr int32_t kSequencesPerStore = 32;  // parameters hold 4 KiB

struct StoredSequences {
  SequenceRecord records[kSequencesPerStore];
  SequenceRecord* target;
  int32_t first;
  int32_t count;
  int32_t* non_finite;  // cleared
};

// One thread block.
struct StoreSequences {
  static constexpr int kThreads = kSequencesPerStore;

  PBS_DEVICE static void Run(const StoredSequences& stored) {
    if (ThreadIndex() == 0) StoreGlobal(stored.non_finite, 0);
    if (ThreadIndex() >= stored.count) return;
    StoreGlobal(stored.target + stored.first + ThreadIndex(),
                stored.records[ThreadIndex()]);
  }
};

}  // namespace pbs::cuda
