// The attention kernels as functions of the host. CUDA sources only.
#pragma once

#include <cstdint>

#include "cuda/attention/attention_variant.h"
#include "cuda/backend/launcher.h"
#include "cuda/backend/tensor_maps.h"
#include "cuda/plan/cuda_plan.h"

namespace pbs::cuda {

struct AttentionLaunch {
  const CudaAttentionPlan& plan;
  const RunParams& run;
  int32_t num_multiprocessors = 0;
  AttentionVariant variant = AttentionVariant::kChosen;
};

// The launcher reports errors.
void LaunchAttentionSm80(const AttentionLaunch& launch, CudaLauncher& launcher);
// Head dim 64, 128; devices of compute capability 9.0. cudaErrorNotSupported for a
// variant that was not built or does not apply.
void LaunchAttentionSm90(const AttentionLaunch& launch, TensorMaps& maps,
                         CudaLauncher& launcher);

}  // namespace pbs::cuda
