#include "server/backend/make_backend.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "loader/cuda_module.h"
#include "pbs/cpu_backend.h"
#include "server/base/process.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const CudaSettings& settings) {
  PBS_ABSL_ASSIGN_OR_RETURN(const CudaModule module,
                            ToAbsl(CudaModule::Load(settings.module)));
  return ToAbsl(module.Create({settings.devices.front(), settings.cublaslt}));
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const CpuSettings& settings) {
  CpuBackendOptions options;
  options.num_threads = settings.threads > 0 ? settings.threads : UsableCpus();
  options.isa = settings.isa;
  PBS_ABSL_ASSIGN_OR_RETURN(options.compute,
                            ToAbsl(ParseComputePreference(settings.compute_dtype)));
  return ToAbsl(CreateCpuBackend(options));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const ServerSettings& settings,
                                                     Log& log) {
  if (settings.backend == BackendChoice::kCpu) return MakeCpuBackend(settings.cpu);
  absl::StatusOr<std::unique_ptr<Backend>> cuda = MakeCudaBackend(settings.cuda);
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
  return MakeCpuBackend(settings.cpu);
}

}  // namespace pbs::server
