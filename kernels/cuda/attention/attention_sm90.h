// Block-sparse attention for Hopper. One thread of a producer warpgroup requests boxes
// of keys and values. Two or three consumer warpgroups of 64 query rows multiply them
// (docs/KERNELS.md, "Hopper").
//
// Grid: any number of blocks of kThreads. Each takes its tiles from a counter. Lists
// are read from their end, so that the masked blocks come first and the loop over the
// other blocks needs no mask.
#pragma once

#include "cuda/attention/sm90_config.h"
#include "cuda/attention/sm90_consumer.h"
#include "cuda/attention/sm90_producer.h"
#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

template <int kCount>
PBS_DEVICE void InitBarriers(Mbarrier (&barriers)[kCount], int arrivals) {
  for (int i = 0; i < kCount; ++i) MbarrierInit(&barriers[i], arrivals);
}

template <class Config>
PBS_DEVICE void AttendSm90(const AttentionParams& params,
                           const Sm90Operands& operands) {
  static_assert(sizeof(Sm90Shared<Config>) <= 227 << 10);
  auto& shared = *reinterpret_cast<Sm90Shared<Config>*>(SharedMemory());
  const int warpgroup = Shuffle(ThreadIndex() / 128, 0);
  if (ThreadIndex() == 0) {
    for (int i = 0; i < Config::kQueryBuffers; ++i) {
      InitBarriers(shared.q_full[i], 1);
      InitBarriers(shared.q_empty[i], 1);
    }
    InitBarriers(shared.k_full, 1);
    InitBarriers(shared.k_empty, Config::kConsumers);
    InitBarriers(shared.v_full, 1);
    InitBarriers(shared.v_empty, Config::kConsumers);
    InitBarriers(shared.tile_full, 1);
    MbarrierInitFence();
  }
  SyncThreads();
  BeginGrid();
  if (warpgroup == 0) {
    DecreaseRegisters<Config::kProducerRegisters>();
    if (ThreadIndex() == 0) Sm90Producer<Config>(params, operands, shared).Run();
  } else {
    IncreaseRegisters<Config::kConsumerRegisters>();
    Sm90Consumer<Config>(params, operands, shared, warpgroup - 1).Run();
  }
}

}  // namespace pbs::cuda
