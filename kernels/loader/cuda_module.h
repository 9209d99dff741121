// Loads libpbs_cuda.so at run time (pbs/cuda_backend.h), so that a program that can use
// a GPU also starts without CUDA.
//
// Threading: safe from any thread. Memory: a loaded module is never unloaded.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "pbs/cuda_backend.h"
#include "pbs/status.h"

namespace pbs {

class CudaModule {
 public:
  // Loads `file`. If that is empty, libpbs_cuda.so is looked for beside the running
  // program, in ../lib relative to it, then in the loader's search path.
  // FailedPrecondition names the tried files with the reasons, or states that the
  // module is of another build.
  static StatusOr<CudaModule> Load(const std::string& file);

  const std::string& file() const { return file_; }

  // The number of devices, at least one; FailedPrecondition states why CUDA sees none.
  StatusOr<int32_t> CountDevices() const;
  StatusOr<std::unique_ptr<Backend>> Create(const CudaBackendOptions& options) const;

 private:
  std::string file_;
  CudaDeviceCountFunction* count_ = nullptr;
  CudaCreateFunction* create_ = nullptr;
};

}  // namespace pbs
