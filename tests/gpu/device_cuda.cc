#include <cuda_runtime.h>

#include <string>

#include "cuda/backend/cuda_driver.h"
#include "cuda/backend/hang_watch.h"
#include "tests/gpu/session.h"

namespace pbs::gpu {
namespace {

Status Check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return OkStatus();
  return Internal(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

StatusOr<Device> OpenDevice(cuda::AttentionVariant variant,
                            std::optional<void*> stream) {
  auto used = static_cast<cudaStream_t>(stream.value_or(nullptr));
  if (!stream.has_value()) {  // the default stream could not be captured
    PBS_RETURN_IF_ERROR(Check("cudaStreamCreate", cudaStreamCreate(&used)));
  }
  PBS_ASSIGN_OR_RETURN(auto driver,
                       cuda::CreateCudaDriver({.stream = used, .attention = variant}));
  return Device{std::move(driver), used};
}

Status RunCaptured(const Device& device, const std::function<Status()>& enqueue) {
  const auto stream = static_cast<cudaStream_t>(device.stream);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  PBS_RETURN_IF_ERROR(
      Check("capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal)));
  const Status status = enqueue();
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  PBS_RETURN_IF_ERROR(status);
  PBS_RETURN_IF_ERROR(Check("end of the capture", ended));
  PBS_RETURN_IF_ERROR(
      Check("cudaGraphInstantiate", cudaGraphInstantiate(&executable, graph, 0)));
  PBS_RETURN_IF_ERROR(Check("cudaGraphLaunch", cudaGraphLaunch(executable, stream)));
  const cudaError_t waited = cudaStreamSynchronize(stream);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  return Check("graph", waited);
}

std::string DescribeHang(int32_t head_dim) {
  static const auto watched = cuda::WatchHangs();
  if (!watched.ok() || (*watched)->hung == 0) return "";
  const cuda::HangRecord& hang = **watched;
  return "block " + std::to_string(hang.block) + ", warpgroup " +
         std::to_string(hang.warpgroup) + " waits for " +
         cuda::NameBarrier(head_dim, hang.barrier) + ", parity " +
         std::to_string(hang.parity) + ", tile " + std::to_string(hang.tile);
}

void Lend(const void*, int64_t) {}

}  // namespace pbs::gpu
