// Attention kernels beside the chosen ones: what another choice is worth, for the
// programs of tests/gpu. No part of the public interface.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "pbs/attention.h"
#include "pbs/cuda_attention.h"
#include "pbs/status.h"

namespace pbs::cuda {

enum class AttentionVariant : int32_t {
  kChosen,        // what CreateCudaAttention() runs
  kAmpere,        // the kernels of compute capability 8.0, on any device
  kOneSection,    // tiles by length alone, whatever keys they read
  kWithoutTurns,  // consumers do not take turns in issuing products
  kMoreStages,    // one stage more of keys and values
  kFewerStages,   // one less (head dim 64)
};
// By AttentionVariant.
inline constexpr std::array<const char*, 6> kAttentionVariantNames = {
    "chosen", "ampere", "one_section", "without_turns", "more_stages", "fewer_stages"};

// As CreateCudaAttention(). Those from kWithoutTurns on are kernels of Hopper, bf16, in
// builds with PBS_CUDA_VARIANTS=ON: Run() answers Internal otherwise.
StatusOr<std::unique_ptr<AttentionBackend>> CreateAttentionVariant(
    const CudaAttentionOptions& options, AttentionVariant variant);

}  // namespace pbs::cuda
