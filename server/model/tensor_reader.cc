#include "server/model/tensor_reader.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "pbs/check.h"
#include "server/model/json.h"

namespace pbs {
namespace {

constexpr int64_t kReadBytesMax = 4 << 20;       // between two looks at `stop`
constexpr int64_t kProgressBytesMin = 16 << 20;  // between two calls of `progress`

// Counts the elements whose bits under a mask are all set: of a lane with all of them,
// adding the lowest one carries into the bit above, and into no other lane. Eight bytes
// at a time, since every byte of a model passes here.
int64_t CountAllSet(const uint8_t* data, int64_t bytes, uint64_t mask,
                    uint64_t lowest) {
  const uint64_t above = mask + lowest;
  const int64_t whole = bytes & -8;
  int64_t found = 0;
  uint64_t lanes = 0;
  for (int64_t at = 0; at < whole; at += 8) {
    std::memcpy(&lanes, data + at, 8);
    const uint64_t carried = ((lanes & mask) + lowest) & above;
    if (carried != 0) found += std::popcount(carried);
  }
  lanes = 0;
  std::memcpy(&lanes, data + whole, static_cast<size_t>(bytes - whole));
  return found + std::popcount(((lanes & mask) + lowest) & above);
}

int64_t CountNotFinite(const TensorInfo& tensor, const uint8_t* data, int64_t bytes) {
  if (!tensor.dtype.has_value()) {  // FP8 has one NaN, and no infinity
    return IsFp8(tensor)
               ? CountAllSet(data, bytes, 0x7F7F7F7F7F7F7F7F, 0x0101010101010101)
               : 0;
  }
  switch (*tensor.dtype) {
    case DType::kF32:
      return CountAllSet(data, bytes, 0x7F8000007F800000, 0x0080000000800000);
    case DType::kF16:
      return CountAllSet(data, bytes, 0x7C007C007C007C00, 0x0400040004000400);
    case DType::kBF16:
      return CountAllSet(data, bytes, 0x7F807F807F807F80, 0x0080008000800080);
  }
  return 0;
}

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
    num_not_finite_ += CountNotFinite(*tensor_, out, count);
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
  if (done_ < tensor_->bytes) return OkStatus();
  if (num_not_finite_ > 0) {
    return InvalidArgument("tensor " + Quoted(tensor_->name) + " has " +
                           std::to_string(num_not_finite_) +
                           " elements that are NaN or infinite");
  }
  session_->digest.Add(*tensor_, hash_.Finish());
  return OkStatus();
}

WeightReader::WeightReader(ReadSession& session, const TensorInfo& weight)
    : session_(&session), reader_(session, weight), is_fp8_(IsFp8(weight)) {
  PBS_CHECK(weight.shape.size() == 2);
}

Status WeightReader::ReadScales() {
  const TensorInfo* scale = FindFp8Scale(session_->checkpoint, tensor());
  PBS_CHECK(scale != nullptr);  // weights.cc has looked
  PBS_ASSIGN_OR_RETURN(grid_, ScaleGridOf(tensor(), *scale, session_->fp8));
  PBS_ASSIGN_OR_RETURN(scales_, ReadAsFloats(*session_, *scale));
  return OkStatus();
}

Status WeightReader::Read(int64_t count, void* rows) {
  const int64_t cols = tensor().shape[1];
  if (!is_fp8_) {
    return reader_.Read(count * cols * DTypeBytes(*tensor().dtype), rows);
  }
  if (scales_.empty()) PBS_RETURN_IF_ERROR(ReadScales());
  stored_.resize(static_cast<size_t>(count * cols));
  PBS_RETURN_IF_ERROR(reader_.Read(count * cols, stored_.data()));
  static const std::array<float, 256> kNumbers = [] {
    std::array<float, 256> numbers;
    for (size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = Fp8ToFloat(static_cast<uint8_t>(i));
    }
    return numbers;
  }();
  const int64_t scales_across = (cols + grid_.cols - 1) / grid_.cols;
  auto* out = static_cast<bf16*>(rows);
  for (int64_t i = 0; i < count; ++i, ++row_) {
    const float* scales = scales_.data() + row_ / grid_.rows * scales_across;
    const uint8_t* in = stored_.data() + i * cols;
    for (int64_t begin = 0; begin < cols; begin += grid_.cols) {
      const float scale = scales[begin / grid_.cols];
      const int64_t end = std::min(cols, begin + grid_.cols);
      for (int64_t col = begin; col < end; ++col) {
        *out++ = ToBf16(kNumbers[in[col]] * scale);
      }
    }
  }
  return OkStatus();
}

StackedRows::StackedRows(ReadSession& session, std::span<const TensorInfo* const> parts)
    : dtype_(WeightReader(session, *parts[0]).dtype()) {
  for (const TensorInfo* part : parts) {
    PBS_CHECK(part->shape.size() == 2 && part->shape[1] == parts[0]->shape[1]);
    parts_.emplace_back(session, *part);
    if (parts_.back().dtype() != dtype_) dtype_ = DType::kF32;
  }
}

int64_t StackedRows::num_rows() const {
  int64_t rows = 0;
  for (const WeightReader& part : parts_) rows += part.tensor().shape[0];
  return rows;
}

Status StackedRows::Read(int64_t count, void* rows) {
  auto* out = static_cast<uint8_t*>(rows);
  while (count > 0) {
    PBS_CHECK(part_ < parts_.size());
    WeightReader& part = parts_[part_];
    const TensorInfo& tensor = part.tensor();
    const int64_t batch = std::min(count, tensor.shape[0] - part_row_);
    const int64_t elements = batch * tensor.shape[1];
    if (part.dtype() == dtype_) {
      PBS_RETURN_IF_ERROR(part.Read(batch, out));
    } else {
      stored_.resize(static_cast<size_t>(elements * DTypeBytes(part.dtype())));
      PBS_RETURN_IF_ERROR(part.Read(batch, stored_.data()));
      ConvertElements(stored_.data(), part.dtype(), out, dtype_, elements);
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

const TensorInfo* FindFp8Scale(const Checkpoint& checkpoint, const TensorInfo& weight) {
  for (const std::string& name : Fp8ScaleNames(weight.name)) {
    if (const TensorInfo* scale = checkpoint.Find(name)) return scale;
  }
  return nullptr;
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
