// Attention on a device with what it takes, and memory there. The device is a GPU
// (device_cuda.cc), or an emulated one (device_emulated.cc), so that the programs of
// this folder run and are tested where there is no GPU.
//
// Threading: one caller at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/backend/attention_variants.h"
#include "cuda/backend/cuda_attention.h"
#include "cuda/backend/driver.h"
#include "cuda/backend/staged_copies.h"
#include "pbs/status.h"

namespace pbs::gpu {

struct Device {
  std::unique_ptr<cuda::Driver> driver;
  void* stream = nullptr;  // that it computes on; emulated, there is none
};

// `stream`: to compute on; nothing: a new one, which stays. Errors as
// CreateCudaDriver().
StatusOr<Device> OpenDevice(cuda::AttentionVariant variant,
                            std::optional<void*> stream);

// Runs what `enqueue` enqueues as a captured graph, and waits. Emulated, it runs as it
// is.
Status RunCaptured(const Device& device, const std::function<Status()>& enqueue);

// Where a kernel of this process waited in vain, such as "block 7, warpgroup 1 waits
// for k_full[1], parity 0, tile 3"; "" when none did, and always without bounded waits
// (hang_watch.h). To be asked before any runs, too.
std::string DescribeHang(int32_t head_dim);

// Emulated, kernels will touch memory that is not the driver's, or, without bytes, no
// more.
void Lend(const void* data, int64_t bytes);

class Session {
 public:
  static StatusOr<std::unique_ptr<Session>> Open(
      cuda::AttentionVariant variant, std::optional<void*> stream = std::nullopt) {
    auto session = std::make_unique<Session>();
    PBS_ASSIGN_OR_RETURN(session->device_, OpenDevice(variant, stream));
    cuda::Driver& driver = session->driver();
    PBS_ASSIGN_OR_RETURN(session->copies_,
                         cuda::StagedCopies::Create(driver, cuda::StreamId::kCompute));
    PBS_ASSIGN_OR_RETURN(session->attention_,
                         cuda::CudaAttention::Create(driver, *session->copies_));
    PBS_ASSIGN_OR_RETURN(session->passed_, driver.CreateEvent());
    return session;
  }

  const Device& device() const { return device_; }
  cuda::Driver& driver() { return *device_.driver; }
  cuda::StagedCopies& copies() { return *copies_; }
  cuda::CudaAttention& attention() { return *attention_; }

  // For everything that was enqueued.
  Status Wait() {
    PBS_RETURN_IF_ERROR(driver().Record(passed_, cuda::StreamId::kCompute));
    return driver().Synchronize(passed_);
  }

 private:
  Device device_;
  std::unique_ptr<cuda::StagedCopies> copies_;
  std::unique_ptr<cuda::CudaAttention> attention_;
  cuda::EventId passed_ = 0;
};

// Elements in the memory of a session's device, which must outlive them.
template <class T>
class DeviceArray {
 public:
  // Poisoned: every bit is set, which is NaN.
  static StatusOr<DeviceArray> Create(Session& session, int64_t count) {
    return Create(session, Poison(count));
  }
  static StatusOr<DeviceArray> Create(Session& session, const std::vector<T>& values) {
    const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(T));
    PBS_ASSIGN_OR_RETURN(void* const data,
                         session.driver().Allocate(cuda::StreamId::kCompute,
                                                   std::max<int64_t>(bytes, 1)));
    DeviceArray array(session, static_cast<T*>(data), bytes);
    PBS_RETURN_IF_ERROR(array.Upload(values));
    return array;
  }

  Status Poison() { return Upload(Poison(bytes_ / static_cast<int64_t>(sizeof(T)))); }
  StatusOr<std::vector<T>> Download() const {
    std::vector<T> values(static_cast<size_t>(bytes_) / sizeof(T));
    PBS_RETURN_IF_ERROR(session_->copies().ToHost(data(), values.data(), bytes_));
    return values;
  }

  T* data() const { return data_.get(); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    Session* session;
    void operator()(T* data) const { session->driver().Free(data); }
  };

  DeviceArray(Session& session, T* data, int64_t bytes)
      : session_(&session), data_(data, Free{&session}), bytes_(bytes) {}
  static std::vector<T> Poison(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    std::memset(values.data(), 0xFF, values.size() * sizeof(T));
    return values;
  }
  Status Upload(const std::vector<T>& values) {
    return session_->copies().ToDevice(values.data(), data(), bytes_);
  }

  Session* session_;
  std::unique_ptr<T, Free> data_;
  int64_t bytes_;
};

}  // namespace pbs::gpu
