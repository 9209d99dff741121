// The CUDA backend's attention: plans on the host, enqueues kernels, reads reports.
#include "pbs/cuda_attention.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cuda/backend/attention_launch.h"
#include "cuda/backend/launcher.h"
#include "cuda/plan/cuda_plan.h"
#include "cuda/plan/cuda_report.h"
#include "cuda/plan/pipeline.h"

namespace pbs {
namespace {

constexpr int32_t kCapabilityMin = 80;
constexpr int32_t kCapabilityHopper = 90;

Status FromCuda(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  const std::string text = std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error);
  return error == cudaErrorMemoryAllocation ? ResourceExhausted(text) : Internal(text);
}

// Points of a run whose times are told.
enum Mark { kBegin, kPermuted, kSelected, kAttended, kNumMarks };

class CudaAttention final : public AttentionBackend {
 public:
  CudaAttention(const CudaAttentionOptions& options, const cudaDeviceProp& device)
      : stream_(static_cast<cudaStream_t>(options.stream)),
        device_(options.device),
        traits_{.num_multiprocessors = device.multiProcessorCount,
                .shared_bytes_max = static_cast<int64_t>(device.sharedMemPerBlockOptin),
                .one_section = options.tuning == CudaTuning::kOneSection},
        tuning_(options.tuning),
        hopper_(options.use_hopper_kernels &&
                device.major * 10 + device.minor == kCapabilityHopper) {}
  ~CudaAttention() override {
    for (cudaEvent_t event : marks_) {
      if (event != nullptr) cudaEventDestroy(event);
    }
  }

  Status Initialize() {
    for (cudaEvent_t& event : marks_) {
      if (Status status = FromCuda("cudaEventCreate", cudaEventCreate(&event));
          !status.ok()) {
        return status;
      }
    }
    return Status();
  }

  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override {
    auto plan = cuda::MakeCudaPlan(problem, traits_);
    if (!plan.ok()) return plan.status();
    return std::unique_ptr<AttentionPlan>(*std::move(plan));
  }

  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override;
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override;

 private:
  cudaError_t Enqueue(const cuda::CudaAttentionPlan& plan, const cuda::RunParams& run);
  template <class Element>
  cudaError_t EnqueueSelection(const cuda::CudaAttentionPlan& plan,
                               const cuda::RunParams& run);
  cudaError_t EnqueueAttention(const cuda::CudaAttentionPlan& plan,
                               const cuda::RunParams& run);
  cudaError_t MarkTime(Mark mark);
  double Seconds(Mark from, Mark to) const {
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, marks_[from], marks_[to]);
    return milliseconds * 1e-3;
  }

  cudaStream_t stream_;
  int32_t device_;
  cuda::DeviceTraits traits_;
  CudaTuning tuning_;
  bool hopper_;
  cudaEvent_t marks_[kNumMarks] = {};
};

template <class Element>
cudaError_t CudaAttention::EnqueueSelection(const cuda::CudaAttentionPlan& plan,
                                            const cuda::RunParams& run) {
  cuda::CudaLauncher launch(stream_);
  const auto enqueue = [&]<int kHeadDim>() {
    cuda::EnqueueOrder<Element, kHeadDim>(plan, run, launch);
    if (launch.error() != cudaSuccess) return launch.error();
    if (const cudaError_t error = MarkTime(kPermuted); error != cudaSuccess) {
      return error;
    }
    cuda::EnqueueLists<Element, kHeadDim>(plan, run, launch);
    return launch.error();
  };
  switch (plan.geometry.head_dim) {
    case 64:
      return enqueue.template operator()<64>();
    case 96:
      return enqueue.template operator()<96>();
    case 128:
      return enqueue.template operator()<128>();
    default:
      return enqueue.template operator()<256>();
  }
}

cudaError_t CudaAttention::EnqueueAttention(const cuda::CudaAttentionPlan& plan,
                                            const cuda::RunParams& run) {
  const AttentionGeometry& g = plan.geometry;
  cuda::AttentionLaunch launch{
      .params = run.attention, .q = run.q, .k = run.k, .v = run.v};
  launch.num_heads = g.num_heads;
  launch.num_order_heads = plan.permutes ? g.num_order_heads : g.num_kv_heads;
  for (const SequenceGeometry& s : g.sequences) {
    launch.q_rows = std::max<int64_t>(launch.q_rows, s.q_len);
    launch.kv_rows = std::max<int64_t>(launch.kv_rows, s.k_len);
  }
  if (run.q.strides.packed != 0) launch.q_rows = g.total_q;
  if (plan.permutes) {
    launch.kv_rows = g.total_slots;
  } else if (run.k.strides.packed != 0) {
    launch.kv_rows = g.total_k;
  }
  launch.num_sequences = static_cast<int32_t>(g.sequences.size());
  launch.head_dim = g.head_dim;
  launch.bf16 = plan.problem.dtype == DType::kBF16;
  launch.num_multiprocessors = traits_.num_multiprocessors;
  launch.tuning = tuning_;
  const bool hopper = hopper_ && (g.head_dim == 64 || g.head_dim == 128);
  return hopper ? cuda::LaunchAttentionSm90(launch, stream_)
                : cuda::LaunchAttentionSm80(launch, stream_);
}

// A graph that this is captured into marks the times of each launch.
cudaError_t CudaAttention::MarkTime(Mark mark) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(stream_, &status);
      error != cudaSuccess) {
    return error;
  }
  return cudaEventRecordWithFlags(marks_[mark], stream_,
                                  status == cudaStreamCaptureStatusActive
                                      ? cudaEventRecordExternal
                                      : cudaEventRecordDefault);
}

cudaError_t CudaAttention::Enqueue(const cuda::CudaAttentionPlan& plan,
                                   const cuda::RunParams& run) {
  cudaError_t error = cudaSetDevice(device_);
  if (error == cudaSuccess) error = MarkTime(kBegin);
  if (error == cudaSuccess) {
    error = plan.problem.dtype == DType::kBF16
                ? EnqueueSelection<cuda::Bf16Element>(plan, run)
                : EnqueueSelection<cuda::F16Element>(plan, run);
  }
  if (error == cudaSuccess) error = MarkTime(kSelected);
  if (error == cudaSuccess) error = EnqueueAttention(plan, run);
  if (error == cudaSuccess) error = MarkTime(kAttended);
  return error;
}

Status CudaAttention::Run(const AttentionPlan& plan, const AttentionTensors& tensors,
                          Workspace workspace, const RunControl& control) {
  if (control.stop != nullptr && control.stop->load(std::memory_order_relaxed)) {
    return Cancelled("attention stopped by its caller");
  }
  const auto& cuda_plan = static_cast<const cuda::CudaAttentionPlan&>(plan);
  const auto run = cuda::MakeRunParams(cuda_plan, tensors, workspace);
  if (!run.ok()) return run.status();
  return FromCuda("attention", Enqueue(cuda_plan, *run));
}

Status CudaAttention::ReadReport(const AttentionPlan& plan, Workspace workspace,
                                 const ReportRequest& request,
                                 AttentionReport* report) {
  const auto& cuda_plan = static_cast<const cuda::CudaAttentionPlan&>(plan);
  if (Status status = FromCuda("waiting for attention", cudaStreamSynchronize(stream_));
      !status.ok()) {
    return status;
  }
  // Only the regions of a report are read: a copy of all would hold permuted keys too.
  const auto regions = cuda::ReportRegions(cuda_plan, request);
  int64_t end = 0;
  for (const cuda::ReportRegion& region : regions) {
    end = std::max(end, region.offset + region.bytes);
  }
  std::vector<std::byte> host(static_cast<size_t>(end));
  for (const cuda::ReportRegion& region : regions) {
    const cudaError_t error =
        cudaMemcpy(host.data() + region.offset,
                   static_cast<const std::byte*>(workspace.data) + region.offset,
                   static_cast<size_t>(region.bytes), cudaMemcpyDeviceToHost);
    if (error != cudaSuccess) return FromCuda("reading the report", error);
  }
  if (Status status = cuda::FillCudaReport(cuda_plan, host.data(), request, report);
      !status.ok()) {
    return status;
  }
  report->stats.permute_seconds = Seconds(kBegin, kPermuted);
  report->stats.select_seconds = Seconds(kPermuted, kSelected);
  report->stats.attend_seconds = Seconds(kSelected, kAttended);
  return Status();
}

}  // namespace

StatusOr<std::unique_ptr<AttentionBackend>> CreateCudaAttention(
    const CudaAttentionOptions& options) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count);
      error != cudaSuccess || options.device < 0 || options.device >= count) {
    return FailedPrecondition("device " + std::to_string(options.device) +
                              " is not there: CUDA sees " + std::to_string(count) +
                              " devices (" + cudaGetErrorString(error) + ")");
  }
  cudaDeviceProp device{};
  if (Status status = FromCuda("cudaGetDeviceProperties",
                               cudaGetDeviceProperties(&device, options.device));
      !status.ok()) {
    return status;
  }
  const int32_t capability = device.major * 10 + device.minor;
  if (capability < kCapabilityMin) {
    return FailedPrecondition(std::string(device.name) + " has compute capability " +
                              std::to_string(device.major) + "." +
                              std::to_string(device.minor) +
                              ", at least 8.0 is needed");
  }
  if (Status status = FromCuda("cudaSetDevice", cudaSetDevice(options.device));
      !status.ok()) {
    return status;
  }
  auto backend = std::make_unique<CudaAttention>(options, device);
  if (Status status = backend->Initialize(); !status.ok()) return status;
  return std::unique_ptr<AttentionBackend>(std::move(backend));
}

}  // namespace pbs
