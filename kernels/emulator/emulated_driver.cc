#include "emulator/emulated_driver.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "cuda/attention/attention_sm80.h"
#include "cuda/attention/attention_sm90.h"
#include "cuda/attention/sm90_variants.h"
#include "cuda/plan/mapped_operand.h"
#include "pbs/check.h"

namespace pbs::emulator {
namespace {

using cuda::AttentionVariant;
using cuda::CudaAttentionPlan;
using cuda::EventId;
using cuda::Product;
using cuda::RunParams;
using cuda::StreamId;

float LoadElement(const void* data, DType dtype, int64_t at) {
  float value = 0;
  ConvertElements(static_cast<const std::byte*>(data) + at * DTypeBytes(dtype), dtype,
                  &value, DType::kF32, 1);
  return value;
}

Fault RunProduct(const Product& product) {
  const cuda::ProductSpec& spec = product.spec;
  // The workspace is the product's: nothing may live there.
  const Workspace& workspace = product.workspace;
  const Fault lent = GlobalMemory::MarkWritten(workspace.data, workspace.bytes);
  if (!lent.ok()) return lent;
  std::memset(workspace.data, 0xFF, static_cast<size_t>(workspace.bytes));
  std::vector<float> x(static_cast<size_t>(spec.depth));
  std::vector<float> w(static_cast<size_t>(spec.depth * spec.cols));
  ConvertElements(product.weight, spec.operands, w.data(), DType::kF32,
                  spec.depth * spec.cols);
  const int64_t operand_bytes = DTypeBytes(spec.operands);
  for (int64_t row = 0; row < product.rows; ++row) {
    const auto* x_row =
        static_cast<const std::byte*>(product.x) + row * spec.x_stride * operand_bytes;
    ConvertElements(x_row, spec.operands, x.data(), DType::kF32, spec.depth);
    for (int64_t col = 0; col < spec.cols; ++col) {
      const float* w_row = w.data() + col * spec.depth;
      float sum = 0;
      for (int64_t i = 0; i < spec.depth; ++i) sum += x[i] * w_row[i];
      const int64_t at = row * spec.y_stride + col;
      if (spec.biased) sum += LoadElement(product.bias, spec.result, col);
      if (spec.adds) sum += LoadElement(product.y, spec.result, at);
      auto* y = static_cast<std::byte*>(product.y) + at * DTypeBytes(spec.result);
      ConvertElements(&sum, DType::kF32, y, spec.result, 1);
    }
    // Kernels may read what products have written.
    auto* y_row = static_cast<std::byte*>(product.y) +
                  row * spec.y_stride * DTypeBytes(spec.result);
    const Fault fault =
        GlobalMemory::MarkWritten(y_row, spec.cols * DTypeBytes(spec.result));
    if (!fault.ok()) return fault;
  }
  return {};
}

// What the driver of a device would make of it.
TensorMap ToTensorMap(const cuda::MappedOperand& mapped) {
  const auto strides = cuda::MapStrides(mapped);
  const auto elements = [&](size_t i) { return static_cast<int64_t>(strides[i] / 2); };
  return {.data = mapped.operand.data,
          .width = mapped.width,
          .rows = mapped.rows,
          .heads = mapped.heads,
          .batch = mapped.sequences,
          .row_stride = elements(0),
          .head_stride = elements(1),
          .batch_stride = elements(2),
          .box_rows = mapped.box_rows};
}

Fault Copy(void* target, const void* source, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
  return {};
}

}  // namespace

void EmulatedDriver::FreeMemory::operator()(void* data) const {
  GlobalMemory::Forbid(data);
  std::free(data);
}

EmulatedDriver::EmulatedDriver(const EmulatedOptions& options)
    : options_(options),
      info_{
          .name = "emulated device",
          .architecture = "emulated",
          .memory_bytes = options.memory_bytes,
          .memory_bytes_free = options.memory_bytes,
          .traits = {.num_multiprocessors = 2,
                     .one_section = options.attention == AttentionVariant::kOneSection,
                     .wide_tiles = options.attention == AttentionVariant::kWideTiles}},
      random_(options.seed) {}

EmulatedDriver::~EmulatedDriver() {
  const std::lock_guard lock(mutex_);
  while (StepLocked()) {
  }
}

Status EmulatedDriver::Health() {
  const std::lock_guard lock(mutex_);
  return health_;
}

StatusOr<void*> EmulatedDriver::TakeLocked(Memory& memory, int64_t bytes, int64_t held,
                                           int64_t limit) {
  PBS_CHECK(bytes > 0);
  if (!health_.ok()) return health_;
  if (held + bytes > limit) {
    return ResourceExhausted("the device has " + std::to_string(limit - held) +
                             " bytes left, " + std::to_string(bytes) + " are needed");
  }
  const auto rounded = static_cast<size_t>(AlignedBytes(bytes));
  void* data = std::aligned_alloc(kMemoryAlignment, rounded);
  PBS_CHECK(data != nullptr);
  std::memset(data, 0xFF, rounded);
  memory[data] = {std::unique_ptr<void, FreeMemory>(data), bytes};
  return data;
}

StatusOr<void*> EmulatedDriver::Allocate(StreamId stream, int64_t bytes) {
  StatusOr<void*> data = nullptr;
  {
    const std::lock_guard lock(mutex_);
    data = TakeLocked(device_, bytes, device_bytes_, options_.memory_bytes);
    if (!data.ok()) return data;
    device_bytes_ += bytes;
    GlobalMemory::Allow(*data, bytes, /*written=*/false);
  }
  // Until the stream is there the memory may be another's.
  Status status = Enqueue(stream, [at = *data, bytes] {
    std::memset(at, 0xFF, static_cast<size_t>(bytes));
    GlobalMemory::Allow(at, bytes, /*written=*/false);
    return Fault();
  });
  if (stream != StreamId::kCompute) {
    constexpr EventId kAllocated = 0;
    if (status.ok()) status = Record(kAllocated, stream);
    if (status.ok()) status = WaitFor(kAllocated, StreamId::kCompute);
  }
  if (status.ok()) return data;
  Free(*data);
  return status;
}

void EmulatedDriver::Free(void* data) {
  const std::lock_guard lock(mutex_);
  // Behind what was enqueued: it may still use the memory.
  while (!streams_[static_cast<size_t>(StreamId::kCompute)].empty() && StepLocked()) {
  }
  device_bytes_ -= device_.at(data).second;
  device_.erase(data);
}

StatusOr<void*> EmulatedDriver::AllocateHost(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  auto data = TakeLocked(host_, bytes, 0, bytes);
  if (data.ok()) host_bytes_ += bytes;
  return data;
}

void EmulatedDriver::FreeHost(void* data) {
  const std::lock_guard lock(mutex_);
  host_bytes_ -= host_.at(data).second;
  host_.erase(data);
}

int64_t EmulatedDriver::bytes_held() const {
  const std::lock_guard lock(mutex_);
  return device_bytes_ + host_bytes_;
}

Status EmulatedDriver::Enqueue(StreamId stream, std::function<Fault()> run,
                               std::function<bool()> is_ready, bool is_product) {
  const std::lock_guard lock(mutex_);
  if (!health_.ok()) return health_;
  ++enqueued_;
  products_ += is_product ? 1 : 0;
  if (enqueued_ == options_.breaks_at ||
      (is_product && products_ == options_.breaks_at_product)) {
    run = [] { return Fault{.what = "the device broke, as it was told to"}; };
    is_ready = nullptr;
  }
  streams_[static_cast<size_t>(stream)].push_back(
      {std::move(run), std::move(is_ready)});
  return OkStatus();
}

bool EmulatedDriver::StepLocked() {
  std::vector<std::deque<Operation>*> ready;
  for (std::deque<Operation>& stream : streams_) {
    if (stream.empty()) continue;
    const Operation& first = stream.front();
    if (first.is_ready == nullptr || first.is_ready()) ready.push_back(&stream);
  }
  if (ready.empty()) return false;
  std::deque<Operation>& stream = *ready[random_() % ready.size()];
  const Operation operation = std::move(stream.front());
  stream.pop_front();
  ++done_;
  if (!health_.ok()) return true;  // a broken device does nothing more
  const Fault fault = operation.run();
  if (!fault.ok()) health_ = Unavailable(fault.ToString());
  return true;
}

Status EmulatedDriver::Clear(StreamId stream, void* target, int64_t bytes) {
  return Enqueue(stream, [=] {
    Fault fault = GlobalMemory::MarkWritten(target, bytes);
    if (fault.ok()) std::memset(target, 0, static_cast<size_t>(bytes));
    return fault;
  });
}

Status EmulatedDriver::CopyToDevice(StreamId stream, const void* host, void* device,
                                    int64_t bytes) {
  return Enqueue(stream, [=] {
    const Fault fault = GlobalMemory::MarkWritten(device, bytes);
    return fault.ok() ? Copy(device, host, bytes) : fault;
  });
}

Status EmulatedDriver::CopyToHost(StreamId stream, const void* device, void* host,
                                  int64_t bytes) {
  // Until it has come, nobody may take it for what it is not.
  std::memset(host, 0xFF, static_cast<size_t>(bytes));
  return Enqueue(stream, [=] {
    const Fault fault = GlobalMemory::CheckAllowed(device, bytes);
    return fault.ok() ? Copy(host, device, bytes) : fault;
  });
}

StatusOr<EventId> EmulatedDriver::CreateEvent() {
  const std::lock_guard lock(mutex_);
  events_.emplace_back();
  return static_cast<EventId>(events_.size() - 1);
}

Status EmulatedDriver::Record(EventId event, StreamId stream) {
  Event* at = nullptr;
  {
    const std::lock_guard lock(mutex_);
    at = &events_[static_cast<size_t>(event)];
    ++at->recorded;
  }
  return Enqueue(stream, [this, at] {
    ++at->passed;
    at->time = done_;
    return Fault();
  });
}

Status EmulatedDriver::WaitFor(EventId event, StreamId stream) {
  const Event* at = nullptr;
  int64_t recorded = 0;
  {
    const std::lock_guard lock(mutex_);
    at = &events_[static_cast<size_t>(event)];
    recorded = at->recorded;
  }
  return Enqueue(
      stream, [] { return Fault(); },
      [this, at, recorded] { return !health_.ok() || at->passed >= recorded; });
}

Status EmulatedDriver::Synchronize(EventId event) {
  const std::lock_guard lock(mutex_);
  const Event& at = events_[static_cast<size_t>(event)];
  const int64_t recorded = at.recorded;
  while (at.passed < recorded) {
    if (!health_.ok()) return health_;
    PBS_CHECK(StepLocked());  // else the streams wait for each other
  }
  return health_;
}

StatusOr<double> EmulatedDriver::SecondsBetween(EventId from, EventId to) {
  const std::lock_guard lock(mutex_);
  if (!health_.ok()) return health_;
  const Event& begin = events_[static_cast<size_t>(from)];
  const Event& end = events_[static_cast<size_t>(to)];
  PBS_CHECK(begin.passed > 0 && end.passed > 0 && begin.passed == begin.recorded &&
            end.passed == end.recorded);
  return static_cast<double>(end.time - begin.time) * 1e-6;
}

Status EmulatedDriver::Multiply(const Product& product) {
  return Enqueue(
      StreamId::kCompute, [product] { return RunProduct(product); }, nullptr,
      /*is_product=*/true);
}

Status EmulatedDriver::Attend(const CudaAttentionPlan& plan, const RunParams& run) {
  if (run.attention.num_tiles == 0) return OkStatus();
  Status status;
  ForKernelsOf(plan, [&]<class Element, int kHeadDim>() {
    if constexpr (kHeadDim == 64 || kHeadDim == 128) {
      if (options_.attention != AttentionVariant::kAmpere) {
        status = AttendAsHopper<Element, kHeadDim>(plan, run);
        return;
      }
    }
    using Config = cuda::Sm80Config<Element, kHeadDim>;
    const LaunchShape shape = {.blocks = run.attention.num_tiles * Config::kParts,
                               .threads = Config::kThreads,
                               .resident_blocks = 2,
                               .shared_bytes = sizeof(cuda::Sm80Shared<Config>),
                               .seed = options_.seed};
    const cuda::Sm80Operands operands = {run.q, run.k, run.v};
    status = Enqueue(StreamId::kCompute, [shape, params = run.attention, operands] {
      return Launch(shape, [&] { cuda::AttendSm80<Config>(params, operands); });
    });
  });
  return status;
}

template <class Element, int kHeadDim>
Status EmulatedDriver::AttendAsHopper(const CudaAttentionPlan& plan,
                                      const RunParams& run) {
  const cuda::MappedOperands mapped = cuda::MapOperands(plan, run);
  const cuda::Sm90Operands operands = {ToTensorMap(mapped.q), ToTensorMap(mapped.k),
                                       ToTensorMap(mapped.v), ToTensorMap(mapped.o),
                                       run.q.strides.packed,  run.k.strides.packed};
  Status status = Internal("this variant of attention does not apply");
  const auto enqueue = [&]<cuda::Sm90Options kOptions>() {
    using Config = cuda::Sm90Config<Element, kHeadDim, kOptions>;
    if (plan.tile_rows != kOptions.rows) return;
    const int32_t blocks =
        std::min(run.attention.num_tiles, info_.traits.num_multiprocessors);
    const LaunchShape shape = {.blocks = blocks,
                               .threads = Config::kThreads,
                               .resident_blocks = blocks,
                               .shared_bytes = sizeof(cuda::Sm90Shared<Config>),
                               .seed = options_.seed};
    status = Enqueue(StreamId::kCompute, [shape, params = run.attention, operands] {
      return Launch(shape, [&] { cuda::AttendSm90<Config>(params, operands); });
    });
  };
  cuda::ForSm90Variant<kHeadDim, /*kAll=*/true>(options_.attention, enqueue);
  return status;
}

EmulatedLauncher EmulatedDriver::MakeLauncher() {
  return EmulatedLauncher(
      [this](std::function<Fault()> run) {
        // An error shows at the next wait, as on a device.
        static_cast<void>(Enqueue(StreamId::kCompute, std::move(run)));
      },
      options_.seed);
}

}  // namespace pbs::emulator
