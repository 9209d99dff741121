#include "server/model/tensor_reader.h"

#include <algorithm>

#include "pbs/check.h"

namespace pbs {
namespace {

constexpr int64_t kReadBytesMax = 4 << 20;       // between two looks at `stop`
constexpr int64_t kProgressBytesMin = 16 << 20;  // between two calls of `progress`

}  // namespace

Status TensorReader::Read(int64_t bytes, void* target) {
  PBS_CHECK(bytes <= tensor_->bytes - done_);
  auto* out = static_cast<uint8_t*>(target);
  const LoadControl& control = session_->control;
  while (bytes > 0) {
    if (control.stop != nullptr && control.stop->load(std::memory_order_relaxed)) {
      return Cancelled("loading was stopped after " +
                       std::to_string(session_->bytes_done) + " bytes");
    }
    const int64_t count = std::min(bytes, kReadBytesMax);
    PBS_RETURN_IF_ERROR(session_->checkpoint.Read(*tensor_, done_, count, out));
    hash_.Update(out, count);
    out += count;
    bytes -= count;
    done_ += count;
    session_->bytes_done += count;
    const bool last = session_->bytes_done == session_->bytes_total;
    if (control.progress != nullptr &&
        (last ||
         session_->bytes_done - session_->bytes_reported >= kProgressBytesMin)) {
      session_->bytes_reported = session_->bytes_done;
      control.progress(session_->bytes_done, session_->bytes_total);
    }
  }
  if (done_ == tensor_->bytes) session_->digest.Add(*tensor_, hash_.Finish());
  return OkStatus();
}

StackedRows::StackedRows(ReadSession& session, std::span<const TensorInfo* const> parts)
    : dtype_(*parts[0]->dtype) {
  for (const TensorInfo* part : parts) {
    PBS_CHECK(part->shape.size() == 2 && part->shape[1] == parts[0]->shape[1]);
    if (*part->dtype != dtype_) dtype_ = DType::kF32;
    parts_.emplace_back(session, *part);
  }
}

int64_t StackedRows::num_rows() const {
  int64_t rows = 0;
  for (const TensorReader& part : parts_) rows += part.tensor().shape[0];
  return rows;
}

Status StackedRows::Read(int64_t count, void* rows) {
  auto* out = static_cast<uint8_t*>(rows);
  while (count > 0) {
    PBS_CHECK(part_ < parts_.size());
    TensorReader& part = parts_[part_];
    const TensorInfo& tensor = part.tensor();
    const int64_t batch = std::min(count, tensor.shape[0] - part_row_);
    const int64_t elements = batch * tensor.shape[1];
    if (*tensor.dtype == dtype_) {
      PBS_RETURN_IF_ERROR(part.Read(elements * DTypeBytes(dtype_), out));
    } else {
      stored_.resize(static_cast<size_t>(elements * DTypeBytes(*tensor.dtype)));
      PBS_RETURN_IF_ERROR(
          part.Read(static_cast<int64_t>(stored_.size()), stored_.data()));
      ConvertElements(stored_.data(), *tensor.dtype, out, dtype_, elements);
    }
    out += elements * DTypeBytes(dtype_);
    count -= batch;
    part_row_ += batch;
    if (part_row_ == tensor.shape[0]) {
      ++part_;
      part_row_ = 0;
    }
  }
  return OkStatus();
}

StatusOr<std::vector<float>> ReadAsFloats(ReadSession& session,
                                          const TensorInfo& tensor) {
  std::vector<uint8_t> stored(static_cast<size_t>(tensor.bytes));
  PBS_RETURN_IF_ERROR(TensorReader(session, tensor).Read(tensor.bytes, stored.data()));
  const int64_t count = tensor.bytes / DTypeBytes(*tensor.dtype);
  std::vector<float> values(static_cast<size_t>(count));
  ConvertElements(stored.data(), *tensor.dtype, values.data(), DType::kF32, count);
  return values;
}

}  // namespace pbs
