// Spec: PackLinear() and Linear() in kernels/include/pbs/backend.h, and NextPiece() in
// kernels/cpu/linear_matmul.h. Against plain f64 loops.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cpu/linear_matmul.h"
#include "pbs/cpu_backend.h"
#include "tests/support/case_name.h"

namespace pbs {
namespace {

TEST(NextPieceSpec, CoversEveryRowOnceInAtMostTwoProductsBehindWholeBlocks) {
  for (int64_t rows = 1; rows <= 1100; ++rows) {
    SCOPED_TRACE(rows);
    int64_t products = 0;
    for (int64_t done = 0; done < rows; ++products) {
      const cpu::RowPiece piece = cpu::NextPiece(rows, done);
      ASSERT_EQ(piece.count, cpu::kRowBuckets[piece.bucket]);
      ASSERT_GE(piece.first, 0);
      ASSERT_LE(piece.first, done) << "left a hole";
      ASSERT_GT(piece.first + piece.count, done) << "made no progress";
      ASSERT_LE(piece.first + piece.count, rows) << "read past the end";
      done = piece.first + piece.count;
    }
    EXPECT_LE(products, rows / cpu::kRowBlock + 2);
  }
}

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
      : case_(c), compute_(compute), rows_(rows), x_stride_(c.in + 3) {
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
  int64_t y_stride() const { return y_cols() + 5; }
  DType y_dtype() const {
    return case_.epilogue == LinearEpilogue::kAdd ? DType::kF32 : compute_;
  }

  // Runs on `backend`; y() then holds the result. Counts how often rows were read.
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
    PBS_RETURN_IF_ERROR(
        backend.Linear(*linear, x.data(), rows_, y.data(), workspace.workspace()));
    ConvertElements(y.data(), y_dtype(), y_.data(), DType::kF32, Size(y_));
    return OkStatus();
  }

  float Y(int64_t row, int64_t col) const { return y_[row * y_stride() + col]; }

  struct Expected {
    double value = 0;
    double magnitude = 0;  // sum of |terms|: what rounding is proportional to
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

void CheckLayer(Backend& backend, const LinearCase& c, DType compute, int64_t rows) {
  SCOPED_TRACE(testing::Message() << c.name << " rows " << rows << " compute "
                                  << DTypeName(compute) << " seed 1");
  Layer layer(c, compute, rows, 1);
  const Status status = layer.Run(backend);
  ASSERT_TRUE(status.ok()) << status.ToString();
  // f32 sums of up to 300 terms; the result is rounded once to y's dtype.
  const double stored = layer.y_dtype() == DType::kBF16 ? 0x1p-8 : 0x1p-23;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < layer.y_cols(); ++col) {
      const Layer::Expected expected = layer.At(row, col);
      ASSERT_NEAR(layer.Y(row, col), expected.value,
                  stored * std::abs(expected.value) + 0x1p-19 * expected.magnitude)
          << "row " << row << " col " << col;
    }
    for (int64_t col = layer.y_cols(); col < layer.y_stride(); ++col) {
      ASSERT_EQ(layer.Y(row, col), 0.25f) << "wrote past its columns in row " << row;
    }
  }
}

class LinearSpecTest : public testing::TestWithParam<LinearCase> {};

TEST_P(LinearSpecTest, EqualsPlainLoopsForEveryRowCountAndThreadCount) {
  for (int32_t threads : {1, 3}) {
    const auto backend =
        CreateCpuBackend({.num_threads = threads, .compute = ComputePreference::kF32});
    ASSERT_TRUE(backend.ok()) << backend.status().ToString();
    for (int64_t rows : {1, 2, 3, 5, 64, 100, 257, 600}) {
      CheckLayer(**backend, GetParam(), DType::kF32, rows);
    }
  }
}

TEST_P(LinearSpecTest, EqualsPlainLoopsInBf16WhereTheCpuMultipliesIt) {
  if (GetParam().weights != DType::kBF16) return;  // only these multiply as bf16
  const auto backend =
      CreateCpuBackend({.num_threads = 2, .compute = ComputePreference::kBf16});
  if (!backend.ok()) {
    std::printf("bf16 products NOT RUN: %s\n", backend.status().message().c_str());
    EXPECT_EQ(backend.status().code(), StatusCode::kFailedPrecondition);
    return;
  }
  for (int64_t rows : {1, 2, 3, 5, 64, 100, 257, 600}) {
    CheckLayer(**backend, GetParam(), DType::kBF16, rows);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, LinearSpecTest,
    testing::Values(
        LinearCase{"f32_one_panel", 64, 64, DType::kF32},
        LinearCase{"f32_odd", 37, 101, DType::kF32},
        LinearCase{"f32_without_bias", 37, 101, DType::kF32, LinearEpilogue::kStore,
                   false},
        LinearCase{"f32_one_output", 64, 1, DType::kF32},
        LinearCase{"f32_one_input", 1, 70, DType::kF32},
        LinearCase{"bf16_odd", 37, 101, DType::kBF16},
        LinearCase{"bf16_panels", 128, 192, DType::kBF16},
        LinearCase{"f16_odd", 37, 101, DType::kF16},
        LinearCase{"f32_residual", 96, 100, DType::kF32, LinearEpilogue::kAdd},
        LinearCase{"bf16_residual", 96, 100, DType::kBF16, LinearEpilogue::kAdd, false},
        LinearCase{"f32_gated", 96, 200, DType::kF32, LinearEpilogue::kSwiGlu},
        LinearCase{"bf16_gated", 64, 256, DType::kBF16, LinearEpilogue::kSwiGlu},
        LinearCase{"f16_gated_odd_halves", 33, 134, DType::kF16,
                   LinearEpilogue::kSwiGlu, false}),
    testing_support::CaseName());

TEST(LinearSpecTest, EqualInputsGiveEqualBitsWhateverTheThreadCount) {
  const LinearCase c = {"bits", 96, 200, DType::kBF16};
  std::vector<float> first;
  for (int32_t threads : {1, 2, 4}) {
    const auto backend =
        CreateCpuBackend({.num_threads = threads, .compute = ComputePreference::kF32});
    ASSERT_TRUE(backend.ok());
    Layer layer(c, DType::kF32, 513, 7);
    ASSERT_TRUE(layer.Run(**backend).ok());
    std::vector<float> y;
    for (int64_t col = 0; col < 200; ++col) y.push_back(layer.Y(512, col));
    if (first.empty()) first = y;
    EXPECT_EQ(first, y) << threads << " threads";
  }
}

TEST(LinearSpecTest, WidenedWeightsKeepTheirStoredSize) {
  const auto backend =
      CreateCpuBackend({.num_threads = 1, .compute = ComputePreference::kF32});
  ASSERT_TRUE(backend.ok());
  const RowReader zeros = [](int64_t, int64_t count, void* rows) {
    std::fill_n(static_cast<uint16_t*>(rows), count * 128, uint16_t{0});
    return OkStatus();
  };
  const auto linear = (*backend)->PackLinear({.in_features = 128,
                                              .out_features = 256,
                                              .weight_dtype = DType::kBF16,
                                              .x_stride = 128,
                                              .y_stride = 256},
                                             zeros, {});
  ASSERT_TRUE(linear.ok());
  EXPECT_EQ((*linear)->bytes, 128 * 256 * 2);
}

TEST(LinearSpecTest, PassesOnTheReadersError) {
  const auto backend =
      CreateCpuBackend({.num_threads = 1, .compute = ComputePreference::kF32});
  ASSERT_TRUE(backend.ok());
  const RowReader broken = [](int64_t, int64_t, void*) {
    return DataLoss("short file");
  };
  const auto linear = (*backend)->PackLinear(
      {.in_features = 8, .out_features = 8, .x_stride = 8, .y_stride = 8}, broken, {});
  EXPECT_EQ(linear.status().ToString(), "DATA_LOSS: short file");
}

TEST(LinearSpecTest, RefusesDTypesItCannotMultiplyAndASmallWorkspace) {
  const auto backend =
      CreateCpuBackend({.num_threads = 1, .compute = ComputePreference::kF32});
  ASSERT_TRUE(backend.ok());
  const RowReader zeros = [](int64_t, int64_t count, void* rows) {
    std::fill_n(static_cast<float*>(rows), count * 8, 0.0f);
    return OkStatus();
  };
  LinearSpec spec = {.in_features = 8, .out_features = 8, .x_stride = 8, .y_stride = 8};
  const auto linear = (*backend)->PackLinear(spec, zeros, {});
  ASSERT_TRUE(linear.ok());
  float row[8] = {};
  const Status small = (*backend)->Linear(**linear, row, 1, row, {});
  EXPECT_EQ(small.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(small.message().find("linear workspace of 0 bytes is smaller than"), 0u);
  spec.compute_dtype = DType::kBF16;
  EXPECT_EQ((*backend)->PackLinear(spec, zeros, {}).status().message(),
            "f32 weights cannot be multiplied as bf16");
}

}  // namespace
}  // namespace pbs
