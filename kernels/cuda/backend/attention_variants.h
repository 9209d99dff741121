// Attention with other kernels than the chosen ones: what another choice is worth, for
// the programs of tests/gpu. No part of the public interface.
#pragma once

#include <memory>

#include "cuda/attention/attention_variant.h"
#include "pbs/attention.h"
#include "pbs/cuda_attention.h"
#include "pbs/status.h"

namespace pbs::cuda {

// As CreateCudaAttention(). Variants from kValuesFirst on are kernels of Hopper, bf16,
// in builds with PBS_CUDA_VARIANTS=ON: Run() answers Internal otherwise, and where a
// variant does not apply.
StatusOr<std::unique_ptr<AttentionBackend>> CreateAttentionVariant(
    const CudaAttentionOptions& options, AttentionVariant variant);

}  // namespace pbs::cuda
