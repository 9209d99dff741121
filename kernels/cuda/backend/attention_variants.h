// Attention with a chosen variant of the kernels, so that programs in tests/gpu can
// compare them. Not part of the public interface.
#pragma once

#include <memory>

#include "cuda/attention/attention_variant.h"
#include "pbs/attention.h"
#include "pbs/cuda_attention.h"
#include "pbs/status.h"

namespace pbs::cuda {

// As CreateCudaAttention(). Variants from kValuesFirst on exist for Hopper and bf16, in
// builds with PBS_CUDA_VARIANTS=ON. Run() returns Internal for a variant that does not
// exist or does not apply.
StatusOr<std::unique_ptr<AttentionBackend>> CreateAttentionVariant(
    const CudaAttentionOptions& options, AttentionVariant variant);

}  // namespace pbs::cuda
