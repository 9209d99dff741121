// Writes the plan's sequences to the device from kernel parameters, so that a run need
// not wait for a copy from host memory. It also initialises the run's summary.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/run_summary.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

constexpr int32_t kSequencesPerStore = 32;  // parameters hold 4 KiB

struct StoredSequences {
  SequenceRecord records[kSequencesPerStore];
  SequenceRecord* target;
  int32_t first;
  int32_t count;
  RunSummary* summary;  // null: an earlier launch has initialised it
  BlockCounts* heads;
  int32_t num_heads;  // 0: blocks are not counted
};

// Grid [1].
struct StoreSequences {
  static constexpr int kThreads = kSequencesPerStore;

  PBS_DEVICE static void Run(const StoredSequences& stored) {
    if (stored.summary != nullptr) {
      if (ThreadIndex() == 0) {
        StoreGlobal(stored.summary, RunSummary{.began = GlobalTimer(),
                                               .ordered = 0,
                                               .listed = 0,
                                               .non_finite = 0,
                                               .padding = 0});
      }
      for (int head = ThreadIndex(); head < stored.num_heads; head += kThreads) {
        StoreGlobal(stored.heads + head, BlockCounts{});
      }
    }
    if (ThreadIndex() >= stored.count) return;
    StoreGlobal(stored.target + stored.first + ThreadIndex(),
                stored.records[ThreadIndex()]);
  }
};

}  // namespace pbs::cuda
