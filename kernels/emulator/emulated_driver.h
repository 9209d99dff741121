// A driver whose device is the emulator, so that tests run the CUDA backend without a
// GPU.
//
// Device memory is host memory that only kernels and copies may touch, poisoned until
// written. Streams are queues. Enqueued work runs when a caller waits for it, and the
// streams take seeded random turns, so that a missing wait causes a fault. Products are
// sums in f32. Tests can plant faults (EmulatedFaults).
//
// Threading: as Driver; one call at a time, by a lock.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "cuda/attention/attention_variant.h"
#include "cuda/backend/launched_driver.h"
#include "emulator/machine.h"

namespace pbs::emulator {

struct EmulatedOptions {
  uint32_t seed = 1;
  int64_t memory_bytes = int64_t{1} << 30;  // Allocate() fails beyond
  // The number of the enqueued operation, or product, that breaks the device; 0: none.
  int64_t breaks_at = 0;
  int64_t breaks_at_product = 0;
  // Head dims 64 and 128 run Hopper's kernels, others those of compute capability 8.0.
  cuda::AttentionVariant attention = cuda::AttentionVariant::kChosen;
};

// Launches as operations of the compute stream.
class EmulatedLauncher {
 public:
  using Enqueue = std::function<void(std::function<Fault()>)>;

  EmulatedLauncher(Enqueue enqueue, uint32_t seed)
      : enqueue_(std::move(enqueue)), seed_(seed) {}

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t shared_bytes, const Params& params) {
    if (blocks == 0) return;
    const LaunchShape shape = {.blocks = static_cast<int>(blocks),
                               .threads = Kernel::kThreads,
                               .resident_blocks = 2,
                               .shared_bytes = shared_bytes,
                               .seed = seed_};
    enqueue_([shape, params] { return Launch(shape, [&] { Kernel::Run(params); }); });
  }
  Status Finish() { return OkStatus(); }

 private:
  Enqueue enqueue_;
  uint32_t seed_;
};

class EmulatedDriver final : public cuda::LaunchedDriver<EmulatedLauncher> {
 public:
  explicit EmulatedDriver(const EmulatedOptions& options);
  ~EmulatedDriver() override;

  const cuda::DeviceInfo& info() const override { return info_; }
  Status Health() override;

  StatusOr<void*> Allocate(cuda::StreamId stream, int64_t bytes) override;
  void Free(void* data) override;
  StatusOr<void*> AllocateHost(int64_t bytes) override;
  void FreeHost(void* data) override;

  Status Clear(cuda::StreamId stream, void* target, int64_t bytes) override;
  Status CopyToDevice(cuda::StreamId stream, const void* host, void* device,
                      int64_t bytes) override;
  Status CopyToHost(cuda::StreamId stream, const void* device, void* host,
                    int64_t bytes) override;

  StatusOr<cuda::EventId> CreateEvent() override;
  Status Record(cuda::EventId event, cuda::StreamId stream) override;
  Status WaitFor(cuda::EventId event, cuda::StreamId stream) override;
  Status Synchronize(cuda::EventId event) override;
  StatusOr<double> SecondsBetween(cuda::EventId from, cuda::EventId to) override;

  int64_t product_workspace_bytes() const override { return 1024; }
  Status Multiply(const cuda::Product& product) override;
  Status Attend(const cuda::CudaAttentionPlan& plan,
                const cuda::RunParams& run) override;

  // Bytes that Allocate() and AllocateHost() have given and that are not freed.
  int64_t bytes_held() const;

 protected:
  EmulatedLauncher MakeLauncher() override;

 private:
  // One operation of a stream. A wait is not ready before its event.
  struct Operation {
    std::function<Fault()> run;
    std::function<bool()> is_ready = nullptr;
  };
  struct Event {
    int64_t recorded = 0;  // times
    int64_t passed = 0;
    int64_t time = 0;  // operations done when it last passed
  };
  struct FreeMemory {
    void operator()(void* data) const;
  };
  using Memory = std::map<void*, std::pair<std::unique_ptr<void, FreeMemory>, int64_t>>;

  StatusOr<void*> TakeLocked(Memory& memory, int64_t bytes, int64_t held,
                             int64_t limit);
  Status Enqueue(cuda::StreamId stream, std::function<Fault()> run,
                 std::function<bool()> is_ready = nullptr, bool is_product = false);
  // One operation of a stream that can go on; false when none can.
  bool StepLocked();
  template <class Element, int kHeadDim>
  Status AttendAsHopper(const cuda::CudaAttentionPlan& plan,
                        const cuda::RunParams& run);

  const EmulatedOptions options_;
  cuda::DeviceInfo info_;
  mutable std::mutex mutex_;
  std::mt19937 random_;
  Memory device_;
  Memory host_;
  int64_t device_bytes_ = 0;
  int64_t host_bytes_ = 0;
  std::array<std::deque<Operation>, cuda::kNumStreams> streams_;
  std::deque<Event> events_ = std::deque<Event>(1);  // the first: see Allocate()
  int64_t enqueued_ = 0;
  int64_t products_ = 0;
  int64_t done_ = 0;
  Status health_;
};

}  // namespace pbs::emulator
