// The driver of a real device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "cuda/attention/attention_variant.h"
#include "cuda/backend/driver.h"
#include "cuda/backend/products.h"

namespace pbs::cuda {

struct CudaDriverOptions {
  int32_t device = 0;
  // A cudaStream_t to compute on; nullopt: the driver creates one.
  std::optional<void*> stream;
  AttentionVariant attention = AttentionVariant::kChosen;
  // Creates the Products for the compute stream, a cudaStream_t. Without it Multiply()
  // is Unimplemented.
  std::function<StatusOr<std::unique_ptr<Products>>(void* stream)> make_products = {};
};

// The number of devices that CUDA sees, at least one; FailedPrecondition states why
// there is none.
StatusOr<int32_t> CountDevices();

// FailedPrecondition when there is no driver, no such device, or it is too old.
StatusOr<std::unique_ptr<Driver>> CreateCudaDriver(const CudaDriverOptions& options);

}  // namespace pbs::cuda
