// What libpbs_cuda.so exports (pbs/cuda_backend.h).
#include <memory>
#include <utility>

#include "cuda/backend/cuda_backend.h"
#include "cuda/backend/cuda_driver.h"
#include "pbs/cuda_backend.h"

namespace {

pbs::StatusOr<std::unique_ptr<pbs::Backend>> Create(
    const pbs::CudaBackendOptions& options) {
  PBS_ASSIGN_OR_RETURN(
      std::unique_ptr<pbs::cuda::Driver> driver,
      pbs::cuda::CreateCudaDriver({.device = options.device,
                                   .stream = std::nullopt,
                                   .make_products = [&](void* stream) {
                                     return pbs::cuda::CreateCublasProducts(
                                         stream, options.cublaslt);
                                   }}));
  PBS_ASSIGN_OR_RETURN(auto backend, pbs::cuda::CudaBackend::Create(std::move(driver)));
  return std::unique_ptr<pbs::Backend>(std::move(backend));
}

}  // namespace

#define PBS_EXPORT extern "C" __attribute__((visibility("default")))

PBS_EXPORT const char* pbs_cuda_interface_id() { return PBS_INTERFACE_ID; }

PBS_EXPORT void pbs_cuda_device_count(pbs::StatusOr<int32_t>* count) {
  *count = pbs::cuda::CountDevices();
}

PBS_EXPORT void pbs_cuda_create(const pbs::CudaBackendOptions* options,
                                pbs::StatusOr<std::unique_ptr<pbs::Backend>>* backend) {
  *backend = Create(*options);
}
