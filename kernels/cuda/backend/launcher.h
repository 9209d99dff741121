// Launches of kernels, and calls of the runtime that each kernel needs once. CUDA
// sources only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <set>
#include <type_traits>

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

// Thread blocks for which a multiprocessor must have registers: the kernel's number, or
// two. Without a bound ptxas spills a few registers to fit more blocks.
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

// State of launches on a device.
//
// Threading: one caller at a time.
class LaunchState {
 public:
  // Dynamic shared memory above 48 KiB must be requested once for each kernel. It
  // requests all that the device has, because the setting holds for the process and
  // drivers of other plans share it.
  cudaError_t RaiseSharedMemory(const void* kernel, int64_t bytes) {
    constexpr int64_t kUnasked = 48 << 10;
    if (bytes <= kUnasked || raised_.contains(kernel)) return cudaSuccess;
    int device = 0;
    int most = 0;
    cudaFuncAttributes attributes{};
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                     device);
    }
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most - static_cast<int>(attributes.sharedSizeBytes));
    }
    if (error == cudaSuccess) raised_.insert(kernel);
    return error;
  }

  // True when a kernel starts while the one before it still runs on other
  // multiprocessors, and waits for its end in BeginGrid(). From compute capability 9.0
  // on.
  bool overlaps = false;

 private:
  std::set<const void*> raised_;
};

// Enqueues kernels until one launch fails.
class CudaLauncher {
 public:
  // Kernels of a captured graph do not overlap: a driver that refuses the overlap would
  // end the capture, and no kernel could be launched again.
  CudaLauncher(cudaStream_t stream, LaunchState& state)
      : stream_(stream), state_(&state), overlaps_(state.overlaps) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    error_ = cudaStreamIsCapturing(stream, &capture);
    if (capture != cudaStreamCaptureStatusNone) overlaps_ = false;
  }

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t shared_bytes, const Params& params) {
    Launch(RunKernel<Kernel, Params>, blocks, Kernel::kThreads, shared_bytes, params);
  }

  // Launches a kernel that begins with BeginGrid(). It uses the launch's own error,
  // because cudaGetLastError() may return an error of other code.
  template <class... Params>
  void Launch(void (*kernel)(Params...), int64_t blocks, int threads,
              int64_t shared_bytes, const std::type_identity_t<Params>&... params) {
    if (blocks == 0 || error_ != cudaSuccess) return;
    error_ =
        state_->RaiseSharedMemory(reinterpret_cast<const void*>(kernel), shared_bytes);
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
    if (error_ == cudaSuccess || !overlaps_) return;
    // The driver refuses the overlap: launch without it.
    config.numAttrs = 0;
    if (cudaLaunchKernelEx(&config, kernel, params...) != cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // clears the refusal for other code
    state_->overlaps = false;
    overlaps_ = false;
    error_ = cudaSuccess;
  }

  void Fail(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }
  cudaError_t error() const { return error_; }

 private:
  cudaStream_t stream_;
  LaunchState* state_;
  bool overlaps_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace pbs::cuda
