// What the CUDA backend needs of a device. Two implementations: cuda_driver.cu, and the
// emulated one of tests/emulator, so that everything above runs and is tested without a
// GPU.
//
// Work is enqueued on streams, each in order, and done later; host memory that takes
// part in a copy is the driver's (AllocateHost) and must not be touched meanwhile.
//
// Threading: safe from any thread. Errors: ResourceExhausted when there is not enough
// memory; Unavailable when the device can be used no more (Health()), also later.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/model/model_params.h"
#include "cuda/plan/cuda_plan.h"
#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs::cuda {

enum class StreamId : uint8_t {
  kCompute,   // kernels, and copies that they depend on
  kUpload,    // tensors of requests that wait, on their way to the device
  kDownload,  // results on their way to the host
};
inline constexpr int kNumStreams = 3;

using EventId = int32_t;

struct DeviceInfo {
  std::string name;
  std::string architecture;  // "sm_90"
  int64_t memory_bytes = 0;
  int64_t memory_bytes_free = 0;  // when the driver was made
  DeviceTraits traits;
};

// y[rows, cols] = x[rows, depth] W[cols, depth]^T + bias, or added to y.
struct ProductSpec {
  int64_t depth = 0;
  int64_t cols = 0;
  DType operands = DType::kBF16;  // of x and W
  DType result = DType::kBF16;    // of y and bias: that of the operands, or f32
  bool adds = false;
  bool biased = false;
  int64_t x_stride = 0;
  int64_t y_stride = 0;

  bool operator==(const ProductSpec&) const = default;
};
struct Product {
  ProductSpec spec;
  const void* x = nullptr;
  int64_t rows = 0;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* y = nullptr;
  Workspace workspace;  // of product_workspace_bytes()
};

class Driver {
 public:
  virtual ~Driver() = default;

  virtual const DeviceInfo& info() const = 0;
  // OK, or the first error after which the device can be used no more. Asks the device,
  // waits for nothing.
  virtual Status Health() = 0;

  // Device memory, 256-byte aligned, of unknown contents, `bytes` > 0. It is there for
  // what is enqueued from now on on `stream` and, behind that, on kCompute: what was
  // enqueued before may still use it.
  virtual StatusOr<void*> Allocate(StreamId stream, int64_t bytes) = 0;
  // After everything that was enqueued on kCompute; what other streams do there must
  // have ended.
  virtual void Free(void* data) = 0;
  virtual StatusOr<void*> AllocateHost(int64_t bytes) = 0;
  virtual void FreeHost(void* data) = 0;

  virtual Status Clear(StreamId stream, void* target, int64_t bytes) = 0;
  virtual Status CopyToDevice(StreamId stream, const void* host, void* device,
                              int64_t bytes) = 0;
  virtual Status CopyToHost(StreamId stream, const void* device, void* host,
                            int64_t bytes) = 0;

  // Events live as long as the driver.
  virtual StatusOr<EventId> CreateEvent() = 0;
  virtual Status Record(EventId event, StreamId stream) = 0;
  // What is enqueued on the stream from now on waits for the event.
  virtual Status WaitFor(EventId event, StreamId stream) = 0;
  // The caller waits; at once for an event that was never recorded.
  virtual Status Synchronize(EventId event) = 0;
  // Of two recorded events that are past.
  virtual StatusOr<double> SecondsBetween(EventId from, EventId to) = 0;

  // All below on kCompute.

  virtual Status Embed(const EmbedOp& op) = 0;
  virtual Status Rotations(const RotationsOp& op) = 0;
  virtual Status RmsNorm(const RmsNormOp& op) = 0;
  virtual Status Qkv(const QkvOp& op) = 0;
  virtual Status Logits(const LogitsOp& op) = 0;
  virtual Status CopyRows(const CopyRowsOp& op) = 0;
  virtual Status Gate(const GateRowsParams& params, int64_t rows) = 0;

  virtual int64_t product_workspace_bytes() const = 0;
  virtual Status Multiply(const Product& product) = 0;

  // The stages of a run (plan/pipeline.h), and attention itself.
  virtual Status OrderKeys(const CudaAttentionPlan& plan, const RunParams& run) = 0;
  virtual Status MakeLists(const CudaAttentionPlan& plan, const RunParams& run) = 0;
  virtual Status Attend(const CudaAttentionPlan& plan, const RunParams& run) = 0;
  // Of the sampled rows, after attention; nothing where none are.
  virtual Status MeasureCoverage(const CudaAttentionPlan& plan,
                                 const RunParams& run) = 0;
};

}  // namespace pbs::cuda
