// Spec: server/transfer/finite_scan.h.
#include "server/transfer/finite_scan.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace pbs::server {
namespace {

template <class T>
std::span<const std::byte> Bytes(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

template <class T>
class FiniteScanSpec : public testing::Test {};

using Elements = testing::Types<float, f16, bf16>;
TYPED_TEST_SUITE(FiniteScanSpec, Elements);

TYPED_TEST(FiniteScanSpec, FindsTheFirstNanOrInfinityAnywhere) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
    for (size_t place : {0, 1, 1023, 1024, 2500, 2999}) {
      std::vector<TypeParam> values(3000, FromFloat<TypeParam>(-1.5f));
      values[place] = FromFloat<TypeParam>(bad);
      values.back() = FromFloat<TypeParam>(bad);
      EXPECT_EQ(FirstNonFinite(Bytes(values), kDTypeOf<TypeParam>),
                static_cast<int64_t>(place))
          << "bad " << bad;
    }
  }
}

TYPED_TEST(FiniteScanSpec, AcceptsTheLargestAndSmallestFiniteValues) {
  std::vector<TypeParam> values;
  for (float value : {0.0f, -0.0f, 65504.0f, -65504.0f, 1e-7f}) {
    values.push_back(FromFloat<TypeParam>(value));
  }
  EXPECT_EQ(FirstNonFinite(Bytes(values), kDTypeOf<TypeParam>), std::nullopt);
  EXPECT_EQ(FirstNonFinite({}, kDTypeOf<TypeParam>), std::nullopt);
}

TEST(FiniteScanSpec, DoesNotLookAtABrokenLastElement) {
  const std::vector<float> values = {1.0f, std::numeric_limits<float>::quiet_NaN()};
  EXPECT_EQ(FirstNonFinite(Bytes(values).first(7), DType::kF32), std::nullopt);
  EXPECT_EQ(FirstNonFinite(Bytes(values), DType::kF32), 1);
}

TEST(FiniteScanSpec, EveryF16AndBf16PatternIsJudgedAsItsFloat) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    // As many as are tested at once.
    const std::vector<f16> half(1024, f16{static_cast<uint16_t>(bits)});
    const std::vector<bf16> brain(1024, bf16{static_cast<uint16_t>(bits)});
    ASSERT_EQ(FirstNonFinite(Bytes(half), DType::kF16).has_value(),
              !std::isfinite(ToFloat(half[0])));
    ASSERT_EQ(FirstNonFinite(Bytes(brain), DType::kBF16).has_value(),
              !std::isfinite(ToFloat(brain[0])));
  }
}

}  // namespace
}  // namespace pbs::server
