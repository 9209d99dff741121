// A linear layer with its data, run on any backend and compared with plain f64 loops.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "pbs/backend.h"

namespace pbs::testing_support {

// Elements between the rows of x, and of y.
inline constexpr int64_t kPadding = 8;

struct LinearCase {
  const char* name;
  int64_t in, out;
  DType weights;
  LinearEpilogue epilogue = LinearEpilogue::kStore;
  bool bias = true;
};

void PrintTo(const LinearCase& c, std::ostream* out) { *out << c.name; }

// One layer with its data, and the same in f64.
class Layer {
 public:
  Layer(const LinearCase& c, DType compute, int64_t rows, uint32_t seed)
      : case_(c), compute_(compute), rows_(rows), x_stride_(c.in + kPadding) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    weights_.resize(static_cast<size_t>(c.in * c.out));
    for (float& x : weights_) x = Round(normal(random), c.weights);
    bias_.resize(c.bias ? static_cast<size_t>(c.out) : 0);
    for (float& x : bias_) x = normal(random);
    x_.resize(static_cast<size_t>(rows * x_stride_));
    for (float& x : x_) x = Round(normal(random), compute);
    y_.assign(static_cast<size_t>(rows * y_stride()), 0.25f);
  }

  int64_t y_cols() const {
    return case_.epilogue == LinearEpilogue::kSwiGlu ? case_.out / 2 : case_.out;
  }
  int64_t y_stride() const { return y_cols() + kPadding; }
  DType y_dtype() const {
    return case_.epilogue == LinearEpilogue::kAdd ? DType::kF32 : compute_;
  }

  // Runs on `backend`; y() then holds the result. Counts the reads of each row.
  Status Run(Backend& backend) {
    const LinearSpec spec = {.in_features = case_.in,
                             .out_features = case_.out,
                             .weight_dtype = case_.weights,
                             .compute_dtype = compute_,
                             .epilogue = case_.epilogue,
                             .x_stride = x_stride_,
                             .y_stride = y_stride()};
    const RowReader read = [this](int64_t first, int64_t count, void* rows) {
      EXPECT_EQ(first, next_row_) << "rows are read once, in rising order";
      next_row_ = first + count;
      ConvertElements(weights_.data() + first * case_.in, DType::kF32, rows,
                      case_.weights, count * case_.in);
      return OkStatus();
    };
    PBS_ASSIGN_OR_RETURN(auto linear, backend.PackLinear(spec, read, bias_));
    EXPECT_EQ(next_row_, case_.out);
    PBS_ASSIGN_OR_RETURN(
        Buffer workspace,
        backend.Allocate(backend.LinearWorkspaceBytes(*linear, rows_)));
    std::vector<uint8_t> x(x_.size() * static_cast<size_t>(DTypeBytes(compute_)));
    std::vector<uint8_t> y(y_.size() * static_cast<size_t>(DTypeBytes(y_dtype())));
    ConvertElements(x_.data(), DType::kF32, x.data(), compute_, Size(x_));
    ConvertElements(y_.data(), DType::kF32, y.data(), y_dtype(), Size(y_));
    PBS_ASSIGN_OR_RETURN(const Buffer x_device, Uploaded(backend, x));
    PBS_ASSIGN_OR_RETURN(const Buffer y_device, Uploaded(backend, y));
    PBS_RETURN_IF_ERROR(backend.Linear(*linear, x_device.data(), rows_, y_device.data(),
                                       workspace.workspace()));
    PBS_RETURN_IF_ERROR(
        backend.Download(y_device.data(), y.data(), static_cast<int64_t>(y.size())));
    ConvertElements(y.data(), y_dtype(), y_.data(), DType::kF32, Size(y_));
    return OkStatus();
  }

  float Y(int64_t row, int64_t col) const { return y_[row * y_stride() + col]; }

  struct Expected {
    double value = 0;
    double magnitude = 0;  // sum of |terms|, to which rounding is proportional
  };
  Expected At(int64_t row, int64_t col) const {
    Expected result = Product(row, col);
    if (case_.epilogue == LinearEpilogue::kAdd) result.value += 0.25;
    if (case_.epilogue != LinearEpilogue::kSwiGlu) return result;
    const Expected up = Product(row, col + case_.out / 2);
    const double silu = result.value / (1 + std::exp(-result.value));
    // |silu'| <= 1.1: errors of gate and up, each scaled by the other factor.
    return {silu * up.value, 1.1 * result.magnitude * std::abs(up.value) +
                                 up.magnitude * std::abs(silu)};
  }

 private:
  static StatusOr<Buffer> Uploaded(Backend& backend,
                                   const std::vector<uint8_t>& bytes) {
    const auto size = static_cast<int64_t>(bytes.size());
    PBS_ASSIGN_OR_RETURN(Buffer buffer, backend.Allocate(size));
    PBS_RETURN_IF_ERROR(backend.Upload(bytes.data(), buffer.data(), size));
    return buffer;
  }
  static float Round(float x, DType dtype) {
    if (dtype == DType::kF16) return ToFloat(ToF16(x));
    return dtype == DType::kBF16 ? ToFloat(ToBf16(x)) : x;
  }
  static int64_t Size(const std::vector<float>& v) {
    return static_cast<int64_t>(v.size());
  }
  Expected Product(int64_t row, int64_t col) const {
    Expected result;
    for (int64_t i = 0; i < case_.in; ++i) {
      const double term =
          double{x_[row * x_stride_ + i]} * weights_[col * case_.in + i];
      result.value += term;
      result.magnitude += std::abs(term);
    }
    if (case_.bias) result.value += bias_[col];
    return result;
  }

  const LinearCase case_;
  const DType compute_;
  const int64_t rows_;
  const int64_t x_stride_;
  std::vector<float> weights_, bias_, x_, y_;
  int64_t next_row_ = 0;
};

inline void CheckLayer(Backend& backend, const LinearCase& c, DType compute,
                       int64_t rows, bool rounds_gates = false) {
  SCOPED_TRACE(testing::Message() << c.name << " rows " << rows << " compute "
                                  << DTypeName(compute) << " seed 1");
  Layer layer(c, compute, rows, 1);
  const Status status = layer.Run(backend);
  ASSERT_TRUE(status.ok()) << status.ToString();
  // f32 sums of up to 300 terms; the result is rounded once to y's dtype, and gate and
  // up before it, where `rounds_gates`.
  const double stored = layer.y_dtype() == DType::kBF16  ? 0x1p-8
                        : layer.y_dtype() == DType::kF16 ? 0x1p-11
                                                         : 0x1p-23;
  const double summed = 0x1p-19 + (rounds_gates ? stored : 0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < layer.y_cols(); ++col) {
      const Layer::Expected expected = layer.At(row, col);
      ASSERT_NEAR(layer.Y(row, col), expected.value,
                  stored * std::abs(expected.value) + summed * expected.magnitude)
          << "row " << row << " col " << col;
    }
    for (int64_t col = layer.y_cols(); col < layer.y_stride(); ++col) {
      ASSERT_EQ(layer.Y(row, col), 0.25f) << "wrote past its columns in row " << row;
    }
  }
}

}  // namespace pbs::testing_support
