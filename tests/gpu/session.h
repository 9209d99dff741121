// Attention on a device, with its driver and memory. The device is a GPU
// (device_cuda.cc), or an emulated one (device_emulated.cc), so that the programs of
// this folder run and are tested where there is no GPU.
//
// Threading: one caller at a time.
#pragma once

#include <algorithm>
#include <cstdint>
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
#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs::gpu {

struct Device {
  std::unique_ptr<cuda::Driver> driver;
  void* stream = nullptr;  // the stream that it computes on; null when emulated
  cuda::AttentionVariant variant = cuda::AttentionVariant::kChosen;
};

// Computes on `stream`, or on a new one, which is never destroyed. Errors as
// CreateCudaDriver().
StatusOr<Device> OpenDevice(cuda::AttentionVariant variant,
                            std::optional<void*> stream);

// Runs the work of `enqueue` as a captured graph, and waits. The emulated device runs
// it directly.
Status RunCaptured(const Device& device, const std::function<Status()>& enqueue);

// Describes the wait of a kernel of this process that never ended, or ""
// (hang_watch.h). For the emulated device it is the value of PBS_PLANTED_HANG.
std::string DescribeHang(const Device& device, int32_t head_dim);

// Lets kernels of the emulated device touch memory that is not the driver's; with 0
// bytes, forbids it again.
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

  // Waits for all enqueued work.
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

// Tensors of packed operands; `o` and `lse` may be null.
inline AttentionTensors PackedTensors(const AttentionGeometry& g, const void* q,
                                      const void* k, const void* v, void* o,
                                      void* lse) {
  AttentionTensors tensors;
  tensors.q = {q, PackedLayout(g.total_q, g.head_dim)};
  tensors.k = {k, PackedLayout(g.total_k, g.head_dim)};
  tensors.v = {v, PackedLayout(g.total_k, g.head_dim)};
  tensors.o = {o, PackedLayout(g.total_q, g.head_dim)};
  tensors.lse = {lse, PackedLayout(g.total_q, 1)};
  return tensors;
}

// Memory of a session's device, which must outlive it.
inline StatusOr<Buffer> Allocate(Session& session, int64_t bytes) {
  PBS_ASSIGN_OR_RETURN(
      void* const data,
      session.driver().Allocate(cuda::StreamId::kCompute, std::max<int64_t>(bytes, 1)));
  const auto free = [](void* driver, void* freed, int64_t) {
    static_cast<cuda::Driver*>(driver)->Free(freed);
  };
  return Buffer(data, bytes, free, &session.driver());
}

// Sets every bit, so that all values are NaN.
inline Status Poison(Session& session, const Buffer& buffer) {
  const std::vector<uint8_t> ones(static_cast<size_t>(buffer.bytes()), 0xFF);
  return session.copies().ToDevice(ones.data(), buffer.data(), buffer.bytes());
}

}  // namespace pbs::gpu
