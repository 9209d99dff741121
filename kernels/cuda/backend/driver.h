// The interface between the CUDA backend and a device. cuda_driver.cu implements it,
// and so does the emulator in tests/emulator, so that tests run the backend without a
// GPU.
//
// Work is enqueued on streams and done later, in order on each stream. Host memory of a
// copy must come from AllocateHost() and must not be touched until the copy has ended.
//
// Threading: safe from any thread. Errors: ResourceExhausted when there is not enough
// memory; Unavailable, from then on, when the device is unusable (Health()).
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
  kUpload,    // copies of tensors of waiting requests to the device
  kDownload,  // copies of results to the host
};
inline constexpr int kNumStreams = 3;

using EventId = int32_t;

struct DeviceInfo {
  std::string name;
  std::string architecture;  // "sm_90"
  int64_t memory_bytes = 0;
  int64_t memory_bytes_free = 0;  // when the driver was created
  DeviceTraits traits;
};

// y[rows, cols] = x[rows, depth] W[cols, depth]^T + bias, or added to y.
struct ProductSpec {
  int64_t depth = 0;
  int64_t cols = 0;
  DType operands = DType::kBF16;  // dtype of x and W
  DType result = DType::kBF16;    // dtype of y and bias: that of the operands, or f32
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
  // OK, or the first error after which the device is unusable. Queries the device and
  // does not wait.
  virtual Status Health() = 0;

  // Device memory, 256-byte aligned, of unspecified contents; `bytes` > 0. Only work
  // that is enqueued after this call, on `stream` or after it on kCompute, may use the
  // memory, because earlier work may still use it.
  virtual StatusOr<void*> Allocate(StreamId stream, int64_t bytes) = 0;
  // Frees the memory after all work enqueued on kCompute. Work of other streams on it
  // must have ended.
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
  // Work enqueued on the stream after this call waits for the event.
  virtual Status WaitFor(EventId event, StreamId stream) = 0;
  // The caller waits for the event. Returns at once for an event that was never
  // recorded.
  virtual Status Synchronize(EventId event) = 0;
  // Seconds between two recorded events that have happened.
  virtual StatusOr<double> SecondsBetween(EventId from, EventId to) = 0;

  // All methods below enqueue on kCompute.

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
  // Adds the means of blocks that are not listed to the outputs. Call it after
  // attention. Does nothing unless the plan corrects.
  virtual Status CorrectOutputs(const CudaAttentionPlan& plan,
                                const RunParams& run) = 0;
  // Measures coverage of the sampled rows. Call it after attention. Does nothing when
  // no rows are sampled.
  virtual Status MeasureCoverage(const CudaAttentionPlan& plan,
                                 const RunParams& run) = 0;
};

}  // namespace pbs::cuda
