// Spec: PackLinear() and Linear() in kernels/include/pbs/backend.h, and NextPiece() in
// kernels/cpu/linear_matmul.h. Against plain f64 loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/linear_matmul.h"
#include "pbs/cpu_backend.h"
#include "tests/support/case_name.h"
#include "tests/support/linear_layer_case.h"

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

using testing_support::CheckLayer;
using testing_support::Layer;
using testing_support::LinearCase;

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
