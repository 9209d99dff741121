// The CUDA backend: kernels of this project for attention and pointwise steps, cuBLASLt
// for linear layers. It computes in f16 and bf16; f32 weights are multiplied as bf16.
//
// The backend is a shared module, libpbs_cuda.so, that programs load at run time, so
// that they start without CUDA and without a driver. The module depends on no shared
// CUDA library: the CUDA runtime is linked into it, and it loads the driver and
// cuBLASLt when a backend is created.
//
// Threading and memory: as pbs/backend.h. Calls return when their work is enqueued.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs {

struct CudaBackendOptions {
  int32_t device = 0;
  // The file to load cuBLASLt from. Empty: libcublasLt.so.13 from the loader's search
  // path.
  std::string cublaslt;
};

// Functions that the module exports. C++ classes are passed across the module's
// boundary, so the module and the program must be built from the same public headers by
// the same compiler: compare interface ids first.
//   const char* pbs_cuda_interface_id();
//   void pbs_cuda_device_count(StatusOr<int32_t>*);  at least one, or why there is none
//   void pbs_cuda_create(const CudaBackendOptions*, StatusOr<unique_ptr<Backend>>*);
using CudaInterfaceIdFunction = const char*();
using CudaDeviceCountFunction = void(StatusOr<int32_t>* count);
using CudaCreateFunction = void(const CudaBackendOptions* options,
                                StatusOr<std::unique_ptr<Backend>>* backend);
inline constexpr char kCudaInterfaceIdName[] = "pbs_cuda_interface_id";
inline constexpr char kCudaDeviceCountName[] = "pbs_cuda_device_count";
inline constexpr char kCudaCreateName[] = "pbs_cuda_create";

}  // namespace pbs
