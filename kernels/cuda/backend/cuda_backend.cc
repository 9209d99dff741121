#include "cuda/backend/cuda_backend.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "common/host_memory.h"
#include "cuda/model/model_params.h"
#include "pbs/check.h"

namespace pbs::cuda {
namespace {

// Rows of a weight that are on the host at a time take about this much.
constexpr int64_t kReadBytes = int64_t{8} << 20;
// Rows that keep a device busy; their activations stay small beside a long prompt's.
constexpr int32_t kRowTile = 8192;

struct CudaLinear final : PackedLinear {
  Buffer weight;  // [out_features, in_features] in the compute dtype
  Buffer bias;    // [out_features] in bias_dtype, or empty
  DType bias_dtype = DType::kF32;

  bool gates() const { return spec.epilogue == LinearEpilogue::kSwiGlu; }
};

Status CheckSpec(const LinearSpec& spec) {
  if (spec.compute_dtype == DType::kF32) {
    return InvalidArgument(std::string(DTypeName(spec.weight_dtype)) +
                           " weights cannot be multiplied as f32 by the cuda backend, "
                           "which has f16 and bf16");
  }
  const auto check = [](const char* field, int64_t value) {
    if (value % kColumnsMultiple == 0) return OkStatus();
    return InvalidArgument(std::string(field) + " " + std::to_string(value) +
                           " of a linear layer is not a multiple of " +
                           std::to_string(kColumnsMultiple) +
                           ", which the cuda backend needs");
  };
  PBS_RETURN_IF_ERROR(check("in_features", spec.in_features));
  PBS_RETURN_IF_ERROR(check("out_features", spec.epilogue == LinearEpilogue::kSwiGlu
                                                ? spec.out_features / 2
                                                : spec.out_features));
  PBS_RETURN_IF_ERROR(check("x_stride", spec.x_stride));
  return check("y_stride", spec.y_stride);
}

// Of the product itself; SwiGlu goes through the workspace.
ProductSpec ProductOf(const CudaLinear& linear) {
  const LinearSpec& spec = linear.spec;
  const bool adds = spec.epilogue == LinearEpilogue::kAdd;
  return {.depth = spec.in_features,
          .cols = spec.out_features,
          .operands = spec.compute_dtype,
          .result = adds ? DType::kF32 : spec.compute_dtype,
          .adds = adds,
          .biased = linear.bias.bytes() > 0 && !linear.gates(),
          .x_stride = spec.x_stride,
          .y_stride = linear.gates() ? spec.out_features : spec.y_stride};
}

int64_t GatedBytes(const CudaLinear& linear, int64_t rows) {
  return linear.gates() ? AlignedBytes(rows * linear.spec.out_features *
                                       DTypeBytes(linear.spec.compute_dtype))
                        : 0;
}

}  // namespace

CudaBackend::CudaBackend(std::unique_ptr<Driver> driver)
    : driver_(std::move(driver)),
      info_{.name = "cuda",
            .isa = driver_->info().architecture,
            .device = driver_->info().name,
            .num_threads = driver_->info().traits.num_multiprocessors,
            .row_tile = kRowTile,
            .host_memory = false,
            .device_bytes_free = driver_->info().memory_bytes_free,
            .head_dims = {kCudaHeadDims.begin(), kCudaHeadDims.end()},
            .dtypes = {DType::kF16, DType::kBF16},
            .methods = {kMethods.begin(), kMethods.end()}} {}

CudaBackend::~CudaBackend() = default;

StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(
    std::unique_ptr<Driver> driver) {
  std::unique_ptr<CudaBackend> backend(new CudaBackend(std::move(driver)));
  Driver& device = *backend->driver_;
  PBS_ASSIGN_OR_RETURN(backend->copies_,
                       StagedCopies::Create(device, StreamId::kCompute));
  PBS_ASSIGN_OR_RETURN(backend->attention_,
                       CudaAttention::Create(device, *backend->copies_));
  PBS_ASSIGN_OR_RETURN(backend->downloads_,
                       LaterCopies::Create(device, StreamId::kDownload));
  PBS_ASSIGN_OR_RETURN(backend->uploads_,
                       LaterCopies::Create(device, StreamId::kUpload));
  for (EventId& mark : backend->marks_) {
    PBS_ASSIGN_OR_RETURN(mark, device.CreateEvent());
  }
  return backend;
}

DType CudaBackend::ComputeDType(DType stored) const {
  return stored == DType::kF16 ? DType::kF16 : DType::kBF16;
}

StatusOr<Buffer> CudaBackend::AllocateAny(StreamId stream, int64_t bytes) {
  if (bytes == 0) return Buffer();
  PBS_ASSIGN_OR_RETURN(void* data, driver_->Allocate(stream, bytes));
  const auto free = [](void* driver, void* memory, int64_t) {
    static_cast<Driver*>(driver)->Free(memory);
  };
  return Buffer(data, bytes, free, driver_.get());
}

StatusOr<Buffer> CudaBackend::Allocate(int64_t bytes) {
  PBS_ASSIGN_OR_RETURN(Buffer buffer, AllocateAny(StreamId::kCompute, bytes));
  if (bytes > 0) {
    PBS_RETURN_IF_ERROR(driver_->Clear(StreamId::kCompute, buffer.data(), bytes));
  }
  return buffer;
}

Status CudaBackend::Upload(const void* source, void* target, int64_t bytes) {
  return copies_->ToDevice(source, target, bytes);
}

Status CudaBackend::Download(const void* source, void* target, int64_t bytes) {
  return copies_->ToHost(source, target, bytes);
}

StatusOr<Buffer> CudaBackend::AllocateHost(int64_t bytes) {
  return AllocatePages(bytes);
}

StatusOr<std::unique_ptr<PackedLinear>> CudaBackend::PackLinear(
    const LinearSpec& spec, const RowReader& read, std::span<const float> bias) {
  PBS_RETURN_IF_ERROR(CheckSpec(spec));
  auto linear = std::make_unique<CudaLinear>();
  linear->spec = spec;
  const DType compute = spec.compute_dtype;
  const int64_t row_bytes = spec.in_features * DTypeBytes(compute);
  PBS_ASSIGN_OR_RETURN(linear->weight,
                       AllocateAny(StreamId::kCompute, spec.out_features * row_bytes));
  const int64_t read_row_bytes = spec.in_features * DTypeBytes(spec.weight_dtype);
  const int64_t rows_at_once =
      std::clamp<int64_t>(kReadBytes / read_row_bytes, 1, spec.out_features);
  std::vector<std::byte> stored(static_cast<size_t>(rows_at_once * read_row_bytes));
  std::vector<std::byte> converted(
      spec.weight_dtype == compute ? 0 : static_cast<size_t>(rows_at_once * row_bytes));
  for (int64_t row = 0; row < spec.out_features; row += rows_at_once) {
    const int64_t count = std::min(rows_at_once, spec.out_features - row);
    PBS_RETURN_IF_ERROR(read(row, count, stored.data()));
    const std::byte* rows = stored.data();
    if (!converted.empty()) {
      ConvertElements(stored.data(), spec.weight_dtype, converted.data(), compute,
                      count * spec.in_features);
      rows = converted.data();
    }
    PBS_RETURN_IF_ERROR(
        Upload(rows, static_cast<std::byte*>(linear->weight.data()) + row * row_bytes,
               count * row_bytes));
  }
  if (!bias.empty()) {
    // A product adds its bias in the dtype of the result; SwiGlu adds its own in f32.
    linear->bias_dtype =
        spec.epilogue == LinearEpilogue::kStore ? compute : DType::kF32;
    const auto count = static_cast<int64_t>(bias.size());
    const int64_t bytes = count * DTypeBytes(linear->bias_dtype);
    std::vector<std::byte> values(static_cast<size_t>(bytes));
    ConvertElements(bias.data(), DType::kF32, values.data(), linear->bias_dtype, count);
    PBS_ASSIGN_OR_RETURN(linear->bias, AllocateAny(StreamId::kCompute, bytes));
    PBS_RETURN_IF_ERROR(Upload(values.data(), linear->bias.data(), bytes));
  }
  linear->bytes = linear->weight.bytes() + linear->bias.bytes();
  return StatusOr<std::unique_ptr<PackedLinear>>(std::move(linear));
}

int64_t CudaBackend::LinearWorkspaceBytes(const PackedLinear& linear,
                                          int64_t rows) const {
  return GatedBytes(static_cast<const CudaLinear&>(linear), rows) +
         driver_->product_workspace_bytes();
}

Status CudaBackend::Linear(const PackedLinear& packed, const void* x, int64_t rows,
                           void* y, Workspace workspace) {
  const auto& linear = static_cast<const CudaLinear&>(packed);
  const int64_t needed = LinearWorkspaceBytes(linear, rows);
  if (workspace.bytes < needed) {
    return ResourceExhausted("linear workspace of " + std::to_string(workspace.bytes) +
                             " bytes is smaller than the " + std::to_string(needed) +
                             " that were planned");
  }
  const int64_t gated = GatedBytes(linear, rows);
  auto* at = static_cast<std::byte*>(workspace.data);
  Product product = {.spec = ProductOf(linear),
                     .x = x,
                     .rows = rows,
                     .weight = linear.weight.data(),
                     .bias = linear.bias.data(),
                     .y = linear.gates() ? at : y,
                     .workspace = {at + gated, workspace.bytes - gated}};
  PBS_RETURN_IF_ERROR(driver_->Multiply(product));
  if (!linear.gates()) return OkStatus();
  const int64_t cols = linear.spec.out_features / 2;
  return driver_->Gate({.gate_up = at,
                        .bias = static_cast<const float*>(linear.bias.data()),
                        .y = y,
                        .quads = static_cast<int32_t>(cols / kQuad),
                        .y_stride_quads = linear.spec.y_stride / kQuad,
                        .dtype = linear.spec.compute_dtype},
                       rows);
}

Status CudaBackend::MarkTime(int mark) {
  PBS_CHECK(mark >= 0 && mark < kTimeMarks);
  return driver_->Record(marks_[mark], StreamId::kCompute);
}

StatusOr<double> CudaBackend::SecondsBetween(int from, int to) {
  PBS_CHECK(from >= 0 && from < kTimeMarks && to >= 0 && to < kTimeMarks);
  PBS_RETURN_IF_ERROR(driver_->Synchronize(marks_[to]));
  PBS_RETURN_IF_ERROR(driver_->Synchronize(marks_[from]));
  return driver_->SecondsBetween(marks_[from], marks_[to]);
}

}  // namespace pbs::cuda
