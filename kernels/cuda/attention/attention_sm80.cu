// The Ampere kernels, one per configuration.
#include "cuda/attention/attention_sm80.h"

namespace pbs::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kHeadDim <= 128 ? 2 : 1)
    AttendSm80Kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ Sm80Operands operands) {
  AttendSm80<Config>(params, operands);
}

#define PBS_INSTANTIATE(head_dim)                                                     \
  template __global__ void AttendSm80Kernel<Sm80Config<Bf16Element, head_dim>>(       \
      const __grid_constant__ AttentionParams, const __grid_constant__ Sm80Operands); \
  template __global__ void AttendSm80Kernel<Sm80Config<F16Element, head_dim>>(        \
      const __grid_constant__ AttentionParams, const __grid_constant__ Sm80Operands)

PBS_INSTANTIATE(64);
PBS_INSTANTIATE(96);
PBS_INSTANTIATE(128);
PBS_INSTANTIATE(256);

}  // namespace
}  // namespace pbs::cuda
