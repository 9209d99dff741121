// libpbs_cuda.so, loaded at run time (pbs/cuda_backend.h): so a program that can use a
// GPU starts without CUDA.
//
// Threading: safe from any thread. Memory: a module that was loaded stays.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "pbs/cuda_backend.h"
#include "pbs/status.h"

namespace pbs {

class CudaModule {
 public:
  // `file`, or, if that is empty, libpbs_cuda.so beside the running program, in ../lib
  // seen from there, or where the loader looks. FailedPrecondition names what was tried
  // and why it failed, or that the module is of another build.
  static StatusOr<CudaModule> Load(const std::string& file);

  const std::string& file() const { return file_; }

  // At least one, or FailedPrecondition says why CUDA sees none.
  StatusOr<int32_t> CountDevices() const;
  StatusOr<std::unique_ptr<Backend>> Create(const CudaBackendOptions& options) const;

 private:
  std::string file_;
  CudaDeviceCountFunction* count_ = nullptr;
  CudaCreateFunction* create_ = nullptr;
};

}  // namespace pbs
