// Launches of the kernels that the pipeline names. CUDA sources only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pbs::cuda {

// At least two blocks on a multiprocessor: asked for nothing, ptxas trades a few spills
// for more.
template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::kThreads, 2)
    RunKernel(const __grid_constant__ Params params) {
  Kernel::Run(params);
}

// Dynamic shared memory above 48 KiB must be asked for.
template <class Function>
cudaError_t AllowSharedMemory(Function* kernel, int64_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Enqueues until something fails.
class CudaLauncher {
 public:
  explicit CudaLauncher(cudaStream_t stream) : stream_(stream) {}

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t shared_bytes, const Params& params) {
    if (blocks == 0 || error_ != cudaSuccess) return;
    auto* kernel = RunKernel<Kernel, Params>;
    error_ = AllowSharedMemory(kernel, shared_bytes);
    if (error_ != cudaSuccess) return;
    kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads,
             static_cast<size_t>(shared_bytes), stream_>>>(params);
    error_ = cudaGetLastError();
  }

  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace pbs::cuda
