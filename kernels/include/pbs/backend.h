// A compute device for models: memory, linear layers, pointwise steps, attention.
//
// A backend runs its calls in the order they are made. A call may return before its
// work is done; only the calls that say so wait. Pointers to tensors are device
// pointers: only backend calls read and write them (on the CPU they are ordinary
// memory). Activations are row-major matrices whose rows are contiguous; strides count
// elements.
//
// dtypes: the residual stream is f32. All other values between two operations are in
// the *compute dtype* (ComputeDType()); products accumulate in f32.
//
// Threading: one caller at a time. Safe from any thread at any time are info(),
// Health(), Plan(), Allocate(), AllocateHost(), AllocateForUpload(), UploadLater(),
// LinearWorkspaceBytes() and the destruction of a Buffer: the server admits requests
// and receives their tensors while another request runs. Memory: operations allocate
// nothing that outlives the call; linear layers and attention take a workspace, whose
// size the caller asks for first. Errors: model loading and planning check arguments;
// operations assert them. A failed call leaves its outputs unspecified and the backend
// usable.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pbs/attention.h"
#include "pbs/dtype.h"
#include "pbs/status.h"

namespace pbs {

// Device memory with one owner. The backend that made it must outlive it.
class Buffer {
 public:
  using FreeFunction = void (*)(void* context, void* data, int64_t bytes);

  Buffer() = default;
  Buffer(void* data, int64_t bytes, FreeFunction free, void* context)
      : data_(data), bytes_(bytes), free_(free), context_(context) {}
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)),
        free_(other.free_),
        context_(other.context_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
    std::swap(context_, other.context_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(context_, data_, bytes_);
  }

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // The whole buffer as a workspace.
  Workspace workspace() const { return {data_, bytes_}; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  FreeFunction free_ = nullptr;
  void* context_ = nullptr;
};

struct BackendInfo {
  std::string name;         // "cpu", "cuda"
  std::string isa;          // "avx512_bf16", "sm_90"
  std::string device;       // the processor's own name
  int32_t num_threads = 0;  // multiprocessors of a GPU
  // bf16 over f32 product speed, measured at start; 0 where bf16 products are missing.
  double bf16_speedup = 0;
  // Rows of one linear layer's call that keep the device busy. Prompts go through their
  // layers in tiles of this many rows.
  int32_t row_tile = 1024;
  // True when device memory is ordinary memory. If false, only the backend may touch
  // it, and device_bytes_free is what was free when the backend was created.
  bool host_memory = true;
  int64_t device_bytes_free = 0;
  // Head dims and dtypes that attention supports; others are refused.
  std::vector<int32_t> head_dims;
  std::vector<DType> dtypes;
  // Methods that its attention runs; others are refused.
  std::vector<Method> methods;
};

// The last step of a linear layer: how its products are stored.
enum class LinearEpilogue : uint8_t {
  kStore,   // y = x W^T + b
  kAdd,     // y += x W^T + b; y is f32: the residual stream
  kSwiGlu,  // the first half of W's rows gives g, the second u: y = silu(g) * u
};

struct LinearSpec {
  int64_t in_features = 0;            // columns of W and x
  int64_t out_features = 0;           // rows of W; even for kSwiGlu
  DType weight_dtype = DType::kF32;   // as the reader delivers it
  DType compute_dtype = DType::kF32;  // ComputeDType(weight_dtype): x and y
  LinearEpilogue epilogue = LinearEpilogue::kStore;
  int64_t x_stride = 0;
  int64_t y_stride = 0;
};

// A weight in the layout that the backend multiplies from, and its bias. Only the
// backend that packed it can use it, and must outlive it.
struct PackedLinear {
  virtual ~PackedLinear() = default;

  LinearSpec spec;
  int64_t bytes = 0;  // device memory held
};

// Writes rows [first, first + count) of a weight, each of in_features elements, to host
// memory `rows`. Called once for every row, in rising order.
using RowReader = std::function<Status(int64_t first, int64_t count, void* rows)>;

// residual[i] = table[tokens[i]], widened to f32
struct EmbedOp {
  const void* table = nullptr;  // [vocab, hidden]
  DType table_dtype = DType::kF32;
  const int32_t* tokens = nullptr;  // [rows], each a row of the table
  int64_t rows = 0;
  int64_t hidden = 0;
  float* residual = nullptr;  // [rows, hidden]
};

// cosines[r, i] = cos((first_position + r) frequencies[i]) factor, sines likewise; the
// angles in f64. Positions are below kSeqLenMax, frequencies in [0, 1].
struct RotationsOp {
  const double* frequencies = nullptr;  // [pairs]
  double factor = 1;
  int64_t first_position = 0;
  int64_t rows = 0;
  int64_t pairs = 0;         // head_dim / 2
  float* cosines = nullptr;  // [rows, pairs]
  float* sines = nullptr;
};

// y = x / sqrt(mean(x^2) + epsilon) * weight, row by row
struct RmsNormOp {
  const float* x = nullptr;       // [rows, cols]
  const float* weight = nullptr;  // [cols]
  float epsilon = 0;
  int64_t rows = 0;
  int64_t cols = 0;
  void* y = nullptr;  // [rows, cols]
  DType y_dtype = DType::kF32;
};

// Splits the output of the fused Q, K, V projection: normalises query and key heads
// (where weights are given), rotates them, and puts queries into `q`, keys and values
// into the cache.
struct QkvOp {
  const void* qkv = nullptr;  // [rows, (num_heads + 2 num_kv_heads) head_dim]
  DType qkv_dtype = DType::kF32;
  int64_t rows = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  const float* q_norm = nullptr;  // [head_dim] or null
  const float* k_norm = nullptr;  // [head_dim] or null
  float epsilon = 0;
  // [rows, head_dim / 2]: the rotation of pair (i, i + head_dim / 2).
  const float* cosines = nullptr;
  const float* sines = nullptr;
  DType kv_dtype = DType::kF32;
  void* q = nullptr;  // [rows, num_heads head_dim], kv_dtype
  void* k =
      nullptr;  // row r of head h at (h * kv_head_stride + r * head_dim), kv_dtype
  void* v = nullptr;
  int64_t kv_head_stride = 0;
  // Output for plans that require it (AttentionPlan::pooled_queries_bytes), else null:
  // f32 [blocks, num_heads head_dim], for each block the sum of its rows of `q` (as
  // stored) divided by block_size, also where the block has fewer rows. Row 0 of this
  // call is row `row_in_block` of the first block. All rows of a block must be in one
  // call.
  float* pooled_queries = nullptr;
  int32_t block_size = 0;
  int32_t row_in_block = 0;
};

// y = x W^T in f32, from a weight in its stored layout. It serves output heads, which
// may be tied to the embedding table, and is meant for few rows.
struct LogitsOp {
  const float* x = nullptr;      // [rows, hidden]
  const void* weight = nullptr;  // [vocab, hidden]
  DType weight_dtype = DType::kF32;
  int64_t rows = 0;
  int64_t hidden = 0;
  int64_t vocab = 0;
  float* y = nullptr;  // [rows, vocab]
};

// target[i] = source[row_index[i]] (or source[i] without an index), converted
struct CopyRowsOp {
  const void* source = nullptr;
  DType source_dtype = DType::kF32;
  const int32_t* row_index = nullptr;  // [rows] or null
  int64_t rows = 0;
  int64_t cols = 0;
  void* target = nullptr;  // [rows, cols]; must not overlap the source
  DType target_dtype = DType::kF32;
};

inline constexpr int kTimeMarks = 8;

class Backend : public AttentionBackend {
 public:
  virtual const BackendInfo& info() const = 0;

  // OK, or the error after which the device is unusable. Does not wait.
  virtual Status Health() { return OkStatus(); }

  // The dtype in which weights stored as `stored` are best multiplied here.
  virtual DType ComputeDType(DType stored) const = 0;

  // Zeroed memory, which the buffer's destructor frees. ResourceExhausted when there is
  // not enough. `bytes` >= 0; 0 gives an empty buffer.
  virtual StatusOr<Buffer> Allocate(int64_t bytes) = 0;

  // As Allocate(), but ordinary memory of the host.
  virtual StatusOr<Buffer> AllocateHost(int64_t bytes) = 0;

  // Copies host to device; the caller may reuse `source` on return.
  virtual Status Upload(const void* source, void* target, int64_t bytes) = 0;
  // As Allocate(), but not zeroed; for UploadLater().
  virtual StatusOr<Buffer> AllocateForUpload(int64_t bytes) = 0;
  // Copies host to device in parallel with all other work. `target` is memory of
  // AllocateForUpload() that nothing has used since. `source` and `target` must live
  // until `done`. The backend calls `done` once, when the copy has ended: from any
  // thread, in the order of the UploadLater() calls, perhaps before this returns.
  // Backend calls made after `done` see the copy in `target`. 0 bytes copy nothing;
  // `done` is called all the same.
  virtual void UploadLater(const void* source, void* target, int64_t bytes,
                           std::function<void(const Status&)> done) = 0;
  // Copies device to host and waits for it.
  virtual Status Download(const void* source, void* target, int64_t bytes) = 0;
  // Copies device to host after all earlier calls and in parallel with later ones,
  // which must not change `source`. `done` is called as by UploadLater().
  virtual void DownloadLater(const void* source, void* target, int64_t bytes,
                             std::function<void(const Status&)> done) = 0;

  // Reads a weight through `read` and packs it; `bias` is empty or [out_features].
  // Beside the packed weight it takes host memory for a few hundred rows. Errors of
  // `read` are passed on; InvalidArgument names a dtype combination without an
  // implementation.
  virtual StatusOr<std::unique_ptr<PackedLinear>> PackLinear(
      const LinearSpec& spec, const RowReader& read, std::span<const float> bias) = 0;
  // Bytes of workspace that suffice for any Linear() of at most `rows` rows.
  virtual int64_t LinearWorkspaceBytes(const PackedLinear& linear,
                                       int64_t rows) const = 0;
  // x [rows, in_features], y [rows, out_features] (half for kSwiGlu); rows >= 1.
  virtual Status Linear(const PackedLinear& linear, const void* x, int64_t rows,
                        void* y, Workspace workspace) = 0;

  virtual Status Embed(const EmbedOp& op) = 0;
  virtual Status Rotations(const RotationsOp& op) = 0;
  virtual Status RmsNorm(const RmsNormOp& op) = 0;
  virtual Status Qkv(const QkvOp& op) = 0;
  virtual Status Logits(const LogitsOp& op) = 0;
  virtual Status CopyRows(const CopyRowsOp& op) = 0;

  // Records, for stage times, the moment when all work called so far is done. `mark` is
  // in [0, kTimeMarks).
  virtual Status MarkTime(int mark) = 0;
  // Waits for both marks, which must have been recorded.
  virtual StatusOr<double> SecondsBetween(int from, int to) = 0;
};

}  // namespace pbs
