// Spec: kernels/include/pbs/cpu_backend.h, and the small operations of pbs/backend.h.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "pbs/cpu_backend.h"
#include "tests/support/case_name.h"

namespace pbs {
namespace {

std::unique_ptr<Backend> MakeBackend(const CpuBackendOptions& options = {
                                         .num_threads = 2,
                                         .compute = ComputePreference::kF32}) {
  auto backend = CreateCpuBackend(options);
  EXPECT_TRUE(backend.ok()) << backend.status().ToString();
  return *std::move(backend);
}

struct RefusedCase {
  const char* name;
  CpuBackendOptions options;
  const char* message;
};

class CreateCpuBackendSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(CreateCpuBackendSpec, NamesTheOptionAndWhatIsAccepted) {
  EXPECT_EQ(CreateCpuBackend(GetParam().options).status().message(),
            GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CreateCpuBackendSpec,
    testing::Values(
        RefusedCase{"threads_below_zero",
                    {.num_threads = -1},
                    "num_threads -1 is outside [0, 1024]"},
        RefusedCase{"threads_past_the_limit",
                    {.num_threads = 1025},
                    "num_threads 1025 is outside [0, 1024]"},
        RefusedCase{
            "unknown_isa",
            {.isa = "neon"},
            "isa \"neon\" is not one of auto, scalar, avx2, avx512, avx512_bf16"},
        RefusedCase{"bf16_without_the_isa",
                    {.isa = "scalar", .compute = ComputePreference::kBf16},
                    "compute bf16 needs isa avx512_bf16, not scalar"}),
    testing_support::CaseName());

TEST(CpuBackendSpec, SaysWhatItRunsOn) {
  const auto backend = MakeBackend();
  EXPECT_EQ(backend->info().name, "cpu");
  EXPECT_EQ(backend->info().num_threads, 2);
  EXPECT_FALSE(backend->info().isa.empty());
  EXPECT_FALSE(backend->info().device.empty());
}

TEST(CpuBackendSpec, TakesTheUsableCpusWhenNoThreadCountIsGiven) {
  EXPECT_GE(MakeBackend({.compute = ComputePreference::kF32})->info().num_threads, 1);
}

TEST(CpuBackendSpec, ComputesInBf16OnlyWhereThatWasMeasuredFasterOrAskedFor) {
  EXPECT_EQ(MakeBackend()->ComputeDType(DType::kBF16), DType::kF32);
  const auto automatic = MakeBackend({.num_threads = 1});
  EXPECT_EQ(automatic->ComputeDType(DType::kF32), DType::kF32);
  EXPECT_EQ(automatic->ComputeDType(DType::kF16), DType::kF32);
  EXPECT_EQ(automatic->ComputeDType(DType::kBF16),
            automatic->info().bf16_speedup >= 1.1 ? DType::kBF16 : DType::kF32);
}

TEST(CpuBackendSpec, AllocatesZeroedAlignedMemoryThatMovesWithItsBuffer) {
  const auto backend = MakeBackend();
  auto allocated = backend->Allocate(1 << 20);
  ASSERT_TRUE(allocated.ok());
  Buffer buffer = *std::move(allocated);
  EXPECT_EQ(buffer.bytes(), 1 << 20);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 0u);
  const auto* bytes = static_cast<const char*>(buffer.data());
  EXPECT_EQ(std::accumulate(bytes, bytes + buffer.bytes(), 0), 0);
  Buffer moved = std::move(buffer);
  EXPECT_EQ(moved.workspace().bytes, 1 << 20);
  EXPECT_EQ(buffer.data(), nullptr);
  EXPECT_EQ(backend->Allocate(0)->data(), nullptr);
}

TEST(CpuBackendSpec, RefusesMoreMemoryThanThereIsByNamingTheSize) {
  const auto refused = MakeBackend()->Allocate(int64_t{1} << 60);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.status().message().find("cannot map 1152921504606846976 bytes"),
            0u);
}

TEST(CpuBackendSpec, CopiesInBothDirections) {
  const auto backend = MakeBackend();
  auto buffer = backend->Allocate(64);
  ASSERT_TRUE(buffer.ok());
  const char text[] = "to the device and back";
  char back[sizeof(text)];
  ASSERT_TRUE(backend->Upload(text, buffer->data(), sizeof(text)).ok());
  ASSERT_TRUE(backend->Download(buffer->data(), back, sizeof(text)).ok());
  EXPECT_STREQ(text, back);
}

TEST(CpuBackendSpec, EmbedsTokensInTheirOrder) {
  const auto backend = MakeBackend();
  const float table[] = {0, 1, 10, 11, 20, 21};
  bf16 narrow[6];
  ConvertElements(table, DType::kF32, narrow, DType::kBF16, 6);
  const int32_t tokens[] = {2, 0, 2};
  float residual[6] = {};
  ASSERT_TRUE(backend
                  ->Embed({.table = narrow,
                           .table_dtype = DType::kBF16,
                           .tokens = tokens,
                           .rows = 3,
                           .hidden = 2,
                           .residual = residual})
                  .ok());
  EXPECT_EQ(std::vector<float>(residual, residual + 6),
            (std::vector<float>{20, 21, 0, 1, 20, 21}));
}

TEST(CpuBackendSpec, RotatesByPositionTimesFrequencyExactlyEvenFarOut) {
  const auto backend = MakeBackend();
  // In f32 the angle of the second alone would be off by 0.03.
  const double frequencies[] = {1.0, 0.7498942093324559};
  for (const int64_t first : {int64_t{0}, int64_t{1'000'003}}) {
    SCOPED_TRACE(first);
    float cosines[6];
    float sines[6];
    ASSERT_TRUE(backend
                    ->Rotations({.frequencies = frequencies,
                                 .factor = 1.25,
                                 .first_position = first,
                                 .rows = 3,
                                 .pairs = 2,
                                 .cosines = cosines,
                                 .sines = sines})
                    .ok());
    for (int row = 0; row < 3; ++row) {
      for (int i = 0; i < 2; ++i) {
        const long double angle =
            static_cast<long double>(first + row) * frequencies[i];
        EXPECT_NEAR(cosines[2 * row + i], 1.25 * std::cos(angle), 1e-7);
        EXPECT_NEAR(sines[2 * row + i], 1.25 * std::sin(angle), 1e-7);
      }
    }
  }
}

TEST(CpuBackendSpec, CopiesChosenRowsAndConvertsThem) {
  const auto backend = MakeBackend();
  const float source[] = {0, 1, 10, 11, 20, 21};
  const int32_t rows[] = {2, 1};
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    SCOPED_TRACE(DTypeName(dtype));
    float stored[4] = {};
    float back[4] = {};
    CopyRowsOp op = {.source = source,
                     .row_index = rows,
                     .rows = 2,
                     .cols = 2,
                     .target = stored,
                     .target_dtype = dtype};
    ASSERT_TRUE(backend->CopyRows(op).ok());
    op = {
        .source = stored, .source_dtype = dtype, .rows = 2, .cols = 2, .target = back};
    ASSERT_TRUE(backend->CopyRows(op).ok());
    EXPECT_EQ(std::vector<float>(back, back + 4), (std::vector<float>{20, 21, 10, 11}));
  }
}

TEST(CpuBackendSpec, SplitsQkvIntoQueriesAndHeadMajorCaches) {
  const auto backend = MakeBackend();
  constexpr int32_t kDim = 32;
  constexpr int32_t kCapacity = 5;
  // Two tokens, two query heads, one KV head; every value names its row and head.
  std::vector<float> qkv;
  for (int32_t token = 0; token < 2; ++token) {
    for (int32_t head = 0; head < 4; ++head) {
      qkv.insert(qkv.end(), kDim, static_cast<float>(10 * token + head));
    }
  }
  const std::vector<float> ones(2 * kDim / 2, 1.0f);
  const std::vector<float> zeros(2 * kDim / 2, 0.0f);
  std::vector<float> q(2 * 2 * kDim);
  std::vector<float> k(kCapacity * kDim, -1.0f);
  std::vector<float> v(kCapacity * kDim, -1.0f);
  ASSERT_TRUE(backend
                  ->Qkv({.qkv = qkv.data(),
                         .rows = 2,
                         .num_heads = 2,
                         .num_kv_heads = 1,
                         .head_dim = kDim,
                         .cosines = ones.data(),
                         .sines = zeros.data(),
                         .q = q.data(),
                         .k = k.data() + kDim,  // from position 1 on
                         .v = v.data() + kDim,
                         .kv_head_stride = kCapacity * kDim})
                  .ok());
  EXPECT_EQ(q[0], 0.0f);
  EXPECT_EQ(q[kDim], 1.0f);
  EXPECT_EQ(q[2 * kDim], 10.0f);
  EXPECT_EQ(q[4 * kDim - 1], 11.0f);
  EXPECT_EQ(k[0], -1.0f);
  EXPECT_EQ(k[kDim], 2.0f);
  EXPECT_EQ(k[3 * kDim - 1], 12.0f);
  EXPECT_EQ(k[3 * kDim], -1.0f);
  EXPECT_EQ(v[kDim], 3.0f);
  EXPECT_EQ(v[2 * kDim], 13.0f);
}

TEST(CpuBackendSpec, MeasuresTimeBetweenMarks) {
  const auto backend = MakeBackend();
  ASSERT_TRUE(backend->MarkTime(0).ok());
  ASSERT_TRUE(backend->MarkTime(kTimeMarks - 1).ok());
  const auto seconds = backend->SecondsBetween(0, kTimeMarks - 1);
  ASSERT_TRUE(seconds.ok());
  EXPECT_GE(*seconds, 0.0);
  EXPECT_LT(*seconds, 10.0);
}

}  // namespace
}  // namespace pbs
