#include "cuda/backend/cuda_driver.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/backend/attention_launch.h"
#include "cuda/backend/launched_driver.h"
#include "cuda/backend/launcher.h"

namespace pbs::cuda {
namespace {

constexpr int32_t kCapabilityMin = 80;
constexpr int32_t kCapabilityHopper = 90;

std::string Text(const char* what, cudaError_t error) {
  return std::string(what) + ": " + cudaGetErrorName(error) + ", " +
         cudaGetErrorString(error);
}

// Whether the device goes on: these say what was wrong with a call, everything else
// what went wrong on the device.
bool IsOfCall(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorNotSupported:
    case cudaErrorNotReady:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureImplicit:
    case cudaErrorStreamCaptureWrongThread:
      return true;
    default:
      return false;
  }
}

// Brings the error of its launches to the driver.
class StreamLauncher : public CudaLauncher {
 public:
  using Finished = Status (*)(void* driver, cudaError_t error);
  StreamLauncher(const CudaLauncher& launcher, Finished finished, void* driver)
      : CudaLauncher(launcher), finished_(finished), driver_(driver) {}
  Status Finish() { return finished_(driver_, error()); }

 private:
  Finished finished_;
  void* driver_;
};

class CudaDriver final : public LaunchedDriver<StreamLauncher> {
 public:
  explicit CudaDriver(const CudaDriverOptions& options) : options_(options) {}
  ~CudaDriver() override;

  Status Open(const cudaDeviceProp& device);

  const DeviceInfo& info() const override { return info_; }
  Status Health() override {
    static_cast<void>(Ask());
    const std::lock_guard lock(mutex_);
    return health_;
  }

  StatusOr<void*> Allocate(StreamId stream, int64_t bytes) override;
  void Free(void* data) override;
  StatusOr<void*> AllocateHost(int64_t bytes) override;
  void FreeHost(void* data) override;

  Status Clear(StreamId stream, void* target, int64_t bytes) override {
    return Try("clearing memory", [&] {
      return cudaMemsetAsync(target, 0, static_cast<size_t>(bytes), At(stream));
    });
  }
  Status CopyToDevice(StreamId stream, const void* host, void* device,
                      int64_t bytes) override {
    return Copy(stream, host, device, bytes, cudaMemcpyHostToDevice);
  }
  Status CopyToHost(StreamId stream, const void* device, void* host,
                    int64_t bytes) override {
    return Copy(stream, device, host, bytes, cudaMemcpyDeviceToHost);
  }

  StatusOr<EventId> CreateEvent() override;
  Status Record(EventId event, StreamId stream) override;
  Status WaitFor(EventId event, StreamId stream) override {
    return Try("cudaStreamWaitEvent", [&] {
      return cudaStreamWaitEvent(At(stream), At(event), cudaEventWaitDefault);
    });
  }
  Status Synchronize(EventId event) override {
    return Try("waiting for the device",
               [&] { return cudaEventSynchronize(At(event)); });
  }
  StatusOr<double> SecondsBetween(EventId from, EventId to) override;

  int64_t product_workspace_bytes() const override {
    return products_ == nullptr ? 0 : products_->workspace_bytes();
  }
  Status Multiply(const Product& product) override;
  Status Attend(const CudaAttentionPlan& plan, const RunParams& run) override;

 protected:
  StreamLauncher MakeLauncher() override {
    static_cast<void>(cudaSetDevice(options_.device));  // a launch would tell
    const auto finished = [](void* driver, cudaError_t error) {
      return static_cast<CudaDriver*>(driver)->Checked("launching a kernel", error);
    };
    return StreamLauncher(Launcher(), finished, this);
  }

 private:
  CudaLauncher Launcher() {
    return CudaLauncher(At(StreamId::kCompute), launch_state_);
  }
  // OK, or what `error` is; remembers one that ends the device.
  Status Checked(const char* what, cudaError_t error);
  // The error of the device, if it has one by now; waits for nothing.
  Status Ask() {
    return Try("asking the device", [&] {
      const cudaError_t error = cudaStreamQuery(At(StreamId::kDownload));
      return error == cudaErrorNotReady ? cudaSuccess : error;
    });
  }
  // Runs a call of the runtime on this driver's device, from any thread.
  template <class Call>
  Status Try(const char* what, Call&& call) {
    cudaError_t error = cudaSetDevice(options_.device);
    if (error == cudaSuccess) error = call();
    return Checked(what, error);
  }
  Status Copy(StreamId stream, const void* source, void* target, int64_t bytes,
              cudaMemcpyKind kind) {
    return Try("copying", [&] {
      return cudaMemcpyAsync(target, source, static_cast<size_t>(bytes), kind,
                             At(stream));
    });
  }
  cudaStream_t At(StreamId stream) const {
    return streams_[static_cast<size_t>(stream)];
  }
  cudaEvent_t At(EventId event) const {
    const std::lock_guard lock(mutex_);
    return events_[static_cast<size_t>(event)];
  }

  const CudaDriverOptions options_;
  DeviceInfo info_;
  int32_t capability_ = 0;
  LaunchState launch_state_;
  TensorMaps maps_;
  cudaStream_t streams_[kNumStreams] = {};
  bool owns_stream_[kNumStreams] = {};
  cudaMemPool_t pool_ = nullptr;
  EventId allocated_ = 0;  // on a stream other than kCompute
  std::unique_ptr<Products> products_;
  mutable std::mutex mutex_;
  std::deque<cudaEvent_t> events_;
  Status health_;
};

CudaDriver::~CudaDriver() {
  products_.reset();
  static_cast<void>(cudaSetDevice(options_.device));
  for (int i = 0; i < kNumStreams; ++i) {
    if (!owns_stream_[i]) continue;
    cudaStreamSynchronize(streams_[i]);
    cudaStreamDestroy(streams_[i]);
  }
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  if (pool_ != nullptr) cudaMemPoolDestroy(pool_);
}

Status CudaDriver::Open(const cudaDeviceProp& device) {
  const auto make_stream = [&](StreamId id) {
    const auto i = static_cast<size_t>(id);
    owns_stream_[i] = true;
    return Try("cudaStreamCreate", [&] {
      return cudaStreamCreateWithFlags(&streams_[i], cudaStreamNonBlocking);
    });
  };
  PBS_RETURN_IF_ERROR(make_stream(StreamId::kUpload));
  PBS_RETURN_IF_ERROR(make_stream(StreamId::kDownload));
  if (options_.stream.has_value()) {
    streams_[static_cast<size_t>(StreamId::kCompute)] =
        static_cast<cudaStream_t>(*options_.stream);
  } else {
    PBS_RETURN_IF_ERROR(make_stream(StreamId::kCompute));
  }
  // A pool of its own keeps what it has: nothing is asked of the driver once warm.
  int has_pools = 0;
  PBS_RETURN_IF_ERROR(Try("cudaDeviceGetAttribute", [&] {
    return cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported,
                                  options_.device);
  }));
  if (has_pools == 0) {
    return FailedPrecondition(std::string(device.name) +
                              " has no memory pools (cudaMemPoolCreate) under this "
                              "driver, which the cuda backend needs");
  }
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = options_.device;
  PBS_RETURN_IF_ERROR(
      Try("cudaMemPoolCreate", [&] { return cudaMemPoolCreate(&pool_, &properties); }));
  PBS_ASSIGN_OR_RETURN(allocated_, CreateEvent());
  uint64_t keep = UINT64_MAX;
  PBS_RETURN_IF_ERROR(Try("cudaMemPoolSetAttribute", [&] {
    return cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep);
  }));
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  PBS_RETURN_IF_ERROR(
      Try("cudaMemGetInfo", [&] { return cudaMemGetInfo(&free_bytes, &all_bytes); }));
  capability_ = device.major * 10 + device.minor;
  launch_state_.overlaps = capability_ >= kCapabilityHopper &&
                           options_.attention != AttentionVariant::kWithoutOverlap;
  info_ = {.name = device.name,
           .architecture = "sm_" + std::to_string(capability_),
           .memory_bytes = static_cast<int64_t>(all_bytes),
           .memory_bytes_free = static_cast<int64_t>(free_bytes),
           .traits = {
               .num_multiprocessors = device.multiProcessorCount,
               .shared_bytes_max = static_cast<int64_t>(device.sharedMemPerBlockOptin),
               .one_section = options_.attention == AttentionVariant::kOneSection,
               .wide_tiles = options_.attention == AttentionVariant::kWideTiles}};
  if (options_.make_products == nullptr) return OkStatus();
  PBS_ASSIGN_OR_RETURN(products_, options_.make_products(At(StreamId::kCompute)));
  return OkStatus();
}

Status CudaDriver::Checked(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return OkStatus();
  if (error == cudaErrorMemoryAllocation) return ResourceExhausted(Text(what, error));
  if (IsOfCall(error)) return Internal(Text(what, error));
  const std::lock_guard lock(mutex_);
  if (health_.ok()) health_ = Unavailable("the device is lost, " + Text(what, error));
  return health_;
}

// Frees are on kCompute. What it has yet to free goes to another stream only when the
// device has nothing else; that stream then waits for it (the pool's default policy).
StatusOr<void*> CudaDriver::Allocate(StreamId stream, int64_t bytes) {
  void* data = nullptr;
  const auto allocate = [&] {
    return cudaMallocFromPoolAsync(&data, static_cast<size_t>(bytes), pool_,
                                   At(stream));
  };
  const std::string what =
      "allocating " + std::to_string(bytes) + " bytes of device memory";
  PBS_RETURN_IF_ERROR(Try(what.c_str(), [&] {
    const cudaError_t error = allocate();
    if (error != cudaErrorMemoryAllocation) return error;
    // What the pool keeps may lie in pieces: it gives them back, and is asked again.
    cudaStreamSynchronize(At(StreamId::kCompute));
    cudaMemPoolTrimTo(pool_, 0);
    return allocate();
  }));
  if (stream == StreamId::kCompute) return data;
  // Free() must come behind the allocation, too.
  Status status = Record(allocated_, stream);
  if (status.ok()) status = WaitFor(allocated_, StreamId::kCompute);
  if (status.ok()) return data;
  Free(data);
  return status;
}

void CudaDriver::Free(void* data) {
  // An error is in the driver's health.
  static_cast<void>(
      Try("cudaFree", [&] { return cudaFreeAsync(data, At(StreamId::kCompute)); }));
}

StatusOr<void*> CudaDriver::AllocateHost(int64_t bytes) {
  void* data = nullptr;
  PBS_RETURN_IF_ERROR(Try("allocating pinned host memory", [&] {
    return cudaHostAlloc(&data, static_cast<size_t>(bytes), cudaHostAllocPortable);
  }));
  return data;
}

void CudaDriver::FreeHost(void* data) {
  static_cast<void>(Try("cudaFreeHost", [&] { return cudaFreeHost(data); }));
}

StatusOr<EventId> CudaDriver::CreateEvent() {
  cudaEvent_t event = nullptr;
  // Who waits sleeps: two threads that spin would take two of a pod's cores.
  PBS_RETURN_IF_ERROR(Try("cudaEventCreate", [&] {
    return cudaEventCreateWithFlags(&event, cudaEventBlockingSync);
  }));
  const std::lock_guard lock(mutex_);
  events_.push_back(event);
  return static_cast<EventId>(events_.size() - 1);
}

// A graph that this is captured into records the event at each of its launches.
Status CudaDriver::Record(EventId event, StreamId stream) {
  return Try("cudaEventRecord", [&] {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (const cudaError_t error = cudaStreamIsCapturing(At(stream), &status);
        error != cudaSuccess) {
      return error;
    }
    return cudaEventRecordWithFlags(At(event), At(stream),
                                    status == cudaStreamCaptureStatusActive
                                        ? cudaEventRecordExternal
                                        : cudaEventRecordDefault);
  });
}

StatusOr<double> CudaDriver::SecondsBetween(EventId from, EventId to) {
  float milliseconds = 0;
  PBS_RETURN_IF_ERROR(Try("cudaEventElapsedTime", [&] {
    return cudaEventElapsedTime(&milliseconds, At(from), At(to));
  }));
  return milliseconds * 1e-3;
}

Status CudaDriver::Multiply(const Product& product) {
  if (products_ == nullptr) {
    return Unimplemented("this driver was made without linear layers");
  }
  static_cast<void>(cudaSetDevice(options_.device));
  const Status status = products_->Multiply(product);
  if (status.ok()) return status;
  // cuBLAS does not tell a device that is lost from a call that was wrong.
  const Status lost = Ask();
  return lost.ok() ? status : lost;
}

Status CudaDriver::Attend(const CudaAttentionPlan& plan, const RunParams& run) {
  const int32_t head_dim = plan.geometry.head_dim;
  const bool hopper = capability_ == kCapabilityHopper &&
                      options_.attention != AttentionVariant::kAmpere &&
                      (head_dim == 64 || head_dim == 128);
  return Try("attention", [&] {
    const AttentionLaunch launch = {plan, run, info_.traits.num_multiprocessors,
                                    options_.attention};
    CudaLauncher launcher = Launcher();
    if (hopper) {
      LaunchAttentionSm90(launch, maps_, launcher);
    } else {
      LaunchAttentionSm80(launch, launcher);
    }
    return launcher.error();
  });
}

}  // namespace

StatusOr<int32_t> CountDevices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess)
    return FailedPrecondition(Text("CUDA sees no device", error));
  if (count == 0) return FailedPrecondition("CUDA sees no device");
  return int32_t{count};
}

StatusOr<std::unique_ptr<Driver>> CreateCudaDriver(const CudaDriverOptions& options) {
  PBS_ASSIGN_OR_RETURN(const int32_t count, CountDevices());
  if (options.device < 0 || options.device >= count) {
    return FailedPrecondition("device " + std::to_string(options.device) +
                              " is not there: CUDA sees " + std::to_string(count) +
                              " devices, from 0 on");
  }
  cudaDeviceProp device{};
  if (const cudaError_t error = cudaGetDeviceProperties(&device, options.device);
      error != cudaSuccess) {
    return Internal(Text("cudaGetDeviceProperties", error));
  }
  if (device.major * 10 + device.minor < kCapabilityMin) {
    return FailedPrecondition(std::string(device.name) + " has compute capability " +
                              std::to_string(device.major) + "." +
                              std::to_string(device.minor) +
                              ", at least 8.0 is needed");
  }
  auto driver = std::make_unique<CudaDriver>(options);
  PBS_RETURN_IF_ERROR(driver->Open(device));
  return std::unique_ptr<Driver>(std::move(driver));
}

}  // namespace pbs::cuda
