// Launches of kernels, and what is asked of the runtime once for each. CUDA sources
// only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <type_traits>

#include "cuda/primitives/primitives.h"

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
  BeginGrid();
  Kernel::Run(params);
}

// Dynamic shared memory above 48 KiB must be asked for, once for each kernel and
// device.
//
// Threading: one caller at a time.
class SharedMemoryLimits {
 public:
  cudaError_t Raise(const void* kernel, int64_t bytes) {
    constexpr int64_t kUnasked = 48 << 10;
    int64_t& raised = raised_[kernel];
    if (bytes <= kUnasked || bytes <= raised) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error == cudaSuccess) raised = bytes;
    return error;
  }

 private:
  std::map<const void*, int64_t> raised_;
};

// Enqueues until something fails. With `overlaps`, on devices of compute capability 9.0
// and later, kernels begin when the one before them leaves multiprocessors free: each
// waits for its end by itself (BeginGrid()).
class CudaLauncher {
 public:
  CudaLauncher(cudaStream_t stream, SharedMemoryLimits& limits, bool overlaps)
      : stream_(stream), limits_(&limits), overlaps_(overlaps) {}

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t shared_bytes, const Params& params) {
    Launch(RunKernel<Kernel, Params>, blocks, Kernel::kThreads, shared_bytes, params);
  }

  // Any kernel that begins with BeginGrid(). Takes this launch's own error:
  // cudaGetLastError() would also tell what somebody else left behind.
  template <class... Params>
  void Launch(void (*kernel)(Params...), int64_t blocks, int threads,
              int64_t shared_bytes, const std::type_identity_t<Params>&... params) {
    if (blocks == 0 || error_ != cudaSuccess) return;
    error_ = limits_->Raise(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error_ != cudaSuccess) return;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = &overlap;
    config.numAttrs = overlaps_ ? 1 : 0;
    error_ = cudaLaunchKernelEx(&config, kernel, params...);
  }

  void Fail(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  SharedMemoryLimits* limits_;
  bool overlaps_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace pbs::cuda
