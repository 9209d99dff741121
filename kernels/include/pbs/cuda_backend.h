// The CUDA backend: own kernels for attention and pointwise steps, cuBLASLt for linear
// layers. f16 and bf16; f32 weights are multiplied as bf16.
//
// It lives in a shared module, libpbs_cuda.so, which its user loads at run time: a
// program that can use a GPU needs neither CUDA nor a driver to start. The module links
// no CUDA library either: the runtime is inside, the driver and cuBLASLt are found when
// a backend is made.
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
  // A file to load cuBLASLt from; empty: libcublasLt.so.13 as the loader finds it.
  std::string cublaslt;
};

// What the module exports, by these names. Classes cross its border, so a module and
// its user are built from the same public headers by the same compiler: compare ids
// first.
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
