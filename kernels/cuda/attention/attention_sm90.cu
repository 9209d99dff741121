// The Hopper kernels, one per configuration.
#include "cuda/attention/attention_sm90.h"

namespace pbs::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    AttendSm90Kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ Sm90Operands operands) {
  AttendSm90<Config>(params, operands);
}

template __global__ void AttendSm90Kernel<Sm90Config<Bf16Element, 128, 2, true>>(
    const __grid_constant__ AttentionParams, const __grid_constant__ Sm90Operands);
template __global__ void AttendSm90Kernel<Sm90Config<F16Element, 128, 2, true>>(
    const __grid_constant__ AttentionParams, const __grid_constant__ Sm90Operands);
template __global__ void AttendSm90Kernel<Sm90Config<Bf16Element, 64, 3, true>>(
    const __grid_constant__ AttentionParams, const __grid_constant__ Sm90Operands);
template __global__ void AttendSm90Kernel<Sm90Config<F16Element, 64, 3, true>>(
    const __grid_constant__ AttentionParams, const __grid_constant__ Sm90Operands);

}  // namespace
}  // namespace pbs::cuda
