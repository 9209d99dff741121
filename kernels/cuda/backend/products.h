// Products of linear layers by cuBLASLt, which is loaded at run time.
#pragma once

#include <memory>
#include <string>

#include "cuda/backend/driver.h"

namespace pbs::cuda {

// Threading: one caller at a time. The stream must outlive it.
class Products {
 public:
  virtual ~Products() = default;

  virtual int64_t workspace_bytes() const = 0;
  virtual Status Multiply(const Product& product) = 0;
};

// `stream` is a cudaStream_t, `library` as CudaBackendOptions::cublaslt.
// FailedPrecondition names the library that could not be loaded, and why.
StatusOr<std::unique_ptr<Products>> CreateCublasProducts(void* stream,
                                                         const std::string& library);

}  // namespace pbs::cuda
