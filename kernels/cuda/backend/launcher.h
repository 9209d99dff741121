// Launches of the kernels that the pipeline names. CUDA sources only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace pbs::cuda {

// Blocks that a multiprocessor must have registers for, as the kernel says or two:
// asked for nothing, ptxas trades a few spills for more.
template <class Kernel>
constexpr int ResidentBlocks() {
  if constexpr (requires { Kernel::kResidentBlocks; }) return Kernel::kResidentBlocks;
  return 2;
}

template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::kThreads, ResidentBlocks<Kernel>())
    RunKernel(const __grid_constant__ Params params) {
  Kernel::Run(params);
}

// Dynamic shared memory above 48 KiB must be asked for. Answers with this launch's own
// error: cudaGetLastError() would also tell what somebody else left behind.
template <class... Params>
cudaError_t LaunchKernel(void (*kernel)(Params...), int64_t blocks, int threads,
                         int64_t shared_bytes, cudaStream_t stream,
                         const std::type_identity_t<Params>&... params) {
  if (blocks == 0) return cudaSuccess;
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

// Enqueues until something fails.
class CudaLauncher {
 public:
  explicit CudaLauncher(cudaStream_t stream) : stream_(stream) {}

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t shared_bytes, const Params& params) {
    if (error_ != cudaSuccess) return;
    error_ = LaunchKernel(RunKernel<Kernel, Params>, blocks, Kernel::kThreads,
                          shared_bytes, stream_, params);
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace pbs::cuda
