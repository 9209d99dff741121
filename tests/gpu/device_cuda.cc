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
  static_cast<void>(cuda::DescribeHang(0, variant));  // before a kernel runs
  return Device{std::move(driver), used, variant};
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

std::string DescribeHang(const Device& device, int32_t head_dim) {
  return cuda::DescribeHang(head_dim, device.variant);
}

void Lend(const void*, int64_t) {}

}  // namespace pbs::gpu
