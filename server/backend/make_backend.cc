#include "server/backend/make_backend.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "loader/cuda_module.h"
#include "pbs/cpu_backend.h"
#include "server/base/process.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

using Backends = std::vector<std::unique_ptr<Backend>>;

absl::StatusOr<Backends> MakeCudaBackends(const CudaSettings& settings) {
  PBS_ABSL_ASSIGN_OR_RETURN(const CudaModule module,
                            ToAbsl(CudaModule::Load(settings.module)));
  PBS_ABSL_ASSIGN_OR_RETURN(const int32_t count, ToAbsl(module.CountDevices()));
  std::vector<int32_t> devices = settings.devices;
  if (devices.empty()) {
    devices.resize(static_cast<size_t>(count));
    std::iota(devices.begin(), devices.end(), 0);
  }
  Backends backends;
  for (int32_t device : devices) {
    if (device >= count) {
      return absl::FailedPreconditionError(absl::StrCat("cuda.devices names device ",
                                                        device, "; there are ", count,
                                                        ", counted from 0"));
    }
    PBS_ABSL_ASSIGN_OR_RETURN(
        std::unique_ptr<Backend> backend,
        ToAbsl(module.Create({.device = device, .cublaslt = settings.cublaslt})));
    backends.push_back(std::move(backend));
  }
  return backends;
}

absl::StatusOr<Backends> MakeCpuBackends(const CpuSettings& settings) {
  CpuBackendOptions options;
  options.num_threads = settings.threads > 0 ? settings.threads : UsableCpus();
  options.isa = settings.isa;
  PBS_ABSL_ASSIGN_OR_RETURN(options.compute,
                            ToAbsl(ParseComputePreference(settings.compute_dtype)));
  PBS_ABSL_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                            ToAbsl(CreateCpuBackend(options)));
  Backends backends;
  backends.push_back(std::move(backend));
  return backends;
}

}  // namespace

absl::StatusOr<Backends> MakeBackends(const ServerSettings& settings, Log& log) {
  if (settings.backend == BackendChoice::kCpu) return MakeCpuBackends(settings.cpu);
  absl::StatusOr<Backends> cuda = MakeCudaBackends(settings.cuda);
  if (settings.backend == BackendChoice::kCuda) {
    if (cuda.ok()) return cuda;
    return absl::Status(cuda.status().code(),
                        absl::StrCat("backend cuda: ", cuda.status().message()));
  }
  if (cuda.ok()) {
    log.Info("backend_auto", {{"backend", "cuda"}});
    return cuda;
  }
  log.Info("backend_auto",
           {{"backend", "cpu"}, {"reason", std::string(cuda.status().message())}});
  return MakeCpuBackends(settings.cpu);
}

}  // namespace pbs::server
