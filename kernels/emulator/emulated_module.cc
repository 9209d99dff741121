// A CUDA module (pbs/cuda_backend.h) whose device is emulated, so that a server runs on
// a device with memory of its own where there is none. Settings of its environment:
//
//   PBS_EMULATED_MEMORY_BYTES       Allocate() fails beyond
//   PBS_EMULATED_BREAKS_AT_PRODUCT  the so-many-th product breaks the device
//   PBS_EMULATED_DEVICES            how many there are; 1
#include <cstdlib>
#include <memory>
#include <utility>

#include "cuda/backend/cuda_backend.h"
#include "emulator/emulated_driver.h"
#include "pbs/cuda_backend.h"

namespace {

int64_t Setting(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}

pbs::StatusOr<std::unique_ptr<pbs::Backend>> Create() {
  pbs::emulator::EmulatedOptions options;
  options.memory_bytes = Setting("PBS_EMULATED_MEMORY_BYTES", options.memory_bytes);
  options.breaks_at_product = Setting("PBS_EMULATED_BREAKS_AT_PRODUCT", 0);
  PBS_ASSIGN_OR_RETURN(auto backend,
                       pbs::cuda::CudaBackend::Create(
                           std::make_unique<pbs::emulator::EmulatedDriver>(options)));
  return std::unique_ptr<pbs::Backend>(std::move(backend));
}

}  // namespace

#define PBS_EXPORT extern "C" __attribute__((visibility("default")))

PBS_EXPORT const char* pbs_cuda_interface_id() { return PBS_INTERFACE_ID; }

PBS_EXPORT void pbs_cuda_device_count(pbs::StatusOr<int32_t>* count) {
  *count = static_cast<int32_t>(Setting("PBS_EMULATED_DEVICES", 1));
}

PBS_EXPORT void pbs_cuda_create(const pbs::CudaBackendOptions*,
                                pbs::StatusOr<std::unique_ptr<pbs::Backend>>* backend) {
  *backend = Create();
}
