// The Ampere kernels, one per configuration.
#include "cuda/attention/attention_sm80.h"

#include "cuda/backend/attention_launch.h"
#include "cuda/backend/launcher.h"

namespace pbs::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kHeadDim <= 128 ? 2 : 1)
    AttendSm80Kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ Sm80Operands operands) {
  AttendSm80<Config>(params, operands);
}

template <class Config>
cudaError_t Launch(const AttentionLaunch& launch, cudaStream_t stream) {
  return LaunchKernel(AttendSm80Kernel<Config>,
                      int64_t{launch.params.num_tiles} * Config::kParts,
                      Config::kThreads, sizeof(Sm80Shared<Config>), stream,
                      launch.params, {launch.q, launch.k, launch.v});
}

template <class Element>
cudaError_t LaunchOf(const AttentionLaunch& launch, cudaStream_t stream) {
  switch (launch.head_dim) {
    case 64:
      return Launch<Sm80Config<Element, 64>>(launch, stream);
    case 96:
      return Launch<Sm80Config<Element, 96>>(launch, stream);
    case 128:
      return Launch<Sm80Config<Element, 128>>(launch, stream);
    case 256:
      return Launch<Sm80Config<Element, 256>>(launch, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LaunchAttentionSm80(const AttentionLaunch& launch, cudaStream_t stream) {
  return launch.bf16 ? LaunchOf<Bf16Element>(launch, stream)
                     : LaunchOf<F16Element>(launch, stream);
}

}  // namespace pbs::cuda
