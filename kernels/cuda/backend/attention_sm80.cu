// The Ampere kernels, one per configuration.
#include "cuda/attention/attention_sm80.h"

#include "cuda/backend/attention_launch.h"

namespace pbs::cuda {
namespace {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kHeadDim <= 128 ? 2 : 1)
    AttendSm80Kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ Sm80Operands operands) {
  BeginGrid();
  AttendSm80<Config>(params, operands);
}

template <class Config>
void Launch(const AttentionLaunch& launch, CudaLauncher& launcher) {
  const RunParams& run = launch.run;
  launcher.Launch(AttendSm80Kernel<Config>,
                  int64_t{run.attention.num_tiles} * Config::kParts, Config::kThreads,
                  sizeof(Sm80Shared<Config>), run.attention, {run.q, run.k, run.v});
}

template <class Element>
void LaunchOf(const AttentionLaunch& launch, CudaLauncher& launcher) {
  switch (launch.plan.geometry.head_dim) {
    case 64:
      return Launch<Sm80Config<Element, 64>>(launch, launcher);
    case 96:
      return Launch<Sm80Config<Element, 96>>(launch, launcher);
    case 128:
      return Launch<Sm80Config<Element, 128>>(launch, launcher);
    case 256:
      return Launch<Sm80Config<Element, 256>>(launch, launcher);
    default:
      return launcher.Fail(cudaErrorInvalidValue);
  }
}

}  // namespace

void LaunchAttentionSm80(const AttentionLaunch& launch, CudaLauncher& launcher) {
  if (launch.plan.problem.dtype == DType::kBF16)
    return LaunchOf<Bf16Element>(launch, launcher);
  LaunchOf<F16Element>(launch, launcher);
}

}  // namespace pbs::cuda
