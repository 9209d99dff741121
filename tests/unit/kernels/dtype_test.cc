// Spec: kernels/include/pbs/dtype.h.
#include "pbs/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "tests/support/case_name.h"

namespace pbs {
namespace {

TEST(F16Spec, EveryValueSurvivesTheTripThroughFloat) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const f16 half{static_cast<uint16_t>(bits)};
    const float wide = ToFloat(half);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(ToFloat(ToF16(wide)))) << "bits " << bits;
    } else {
      EXPECT_EQ(ToF16(wide).bits, bits);
    }
  }
}

TEST(Bf16Spec, EveryValueSurvivesTheTripThroughFloat) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const bf16 half{static_cast<uint16_t>(bits)};
    const float wide = ToFloat(half);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(ToFloat(ToBf16(wide)))) << "bits " << bits;
    } else {
      EXPECT_EQ(ToBf16(wide).bits, bits);
    }
  }
}

struct RoundingCase {
  const char* name;
  float value;
  uint16_t f16_bits;
  uint16_t bf16_bits;
};

class RoundingSpec : public testing::TestWithParam<RoundingCase> {};

TEST_P(RoundingSpec, RoundsToNearestTiesToEven) {
  const RoundingCase& c = GetParam();
  EXPECT_EQ(ToF16(c.value).bits, c.f16_bits);
  EXPECT_EQ(ToBf16(c.value).bits, c.bf16_bits);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RoundingSpec,
    testing::Values(
        RoundingCase{"zero", 0.0f, 0x0000, 0x0000},
        RoundingCase{"negative_zero", -0.0f, 0x8000, 0x8000},
        RoundingCase{"one", 1.0f, 0x3C00, 0x3F80},
        RoundingCase{"f16_tie_goes_down_to_even", 1.0f + 0x1p-11f, 0x3C00, 0x3F80},
        RoundingCase{"f16_tie_goes_up_to_even", 1.0f + 3 * 0x1p-11f, 0x3C02, 0x3F80},
        RoundingCase{"bf16_tie_goes_down_to_even", 1.0f + 0x1p-8f, 0x3C04, 0x3F80},
        RoundingCase{"bf16_tie_goes_up_to_even", 1.0f + 3 * 0x1p-8f, 0x3C0C, 0x3F82},
        RoundingCase{"f16_largest", 65504.0f, 0x7BFF, 0x4780},
        RoundingCase{"f16_overflow_tie", 65520.0f, 0x7C00, 0x4780},
        RoundingCase{"f16_below_overflow_tie", 65519.0f, 0x7BFF, 0x4780},
        RoundingCase{"f16_smallest_subnormal", 0x1p-24f, 0x0001, 0x3380},
        RoundingCase{"f16_half_of_smallest_ties_to_zero", 0x1p-25f, 0x0000, 0x3300},
        RoundingCase{"f16_above_half_of_smallest", 0x1.8p-25f, 0x0001, 0x3340},
        RoundingCase{"infinity", INFINITY, 0x7C00, 0x7F80},
        RoundingCase{"f32_largest", std::numeric_limits<float>::max(), 0x7C00, 0x7F80}),
    testing_support::CaseName());

TEST(ParseDTypeSpec, KnowsItsThreeNamesAndRefusesOthers) {
  EXPECT_EQ(*ParseDType("f32"), DType::kF32);
  EXPECT_EQ(*ParseDType("f16"), DType::kF16);
  EXPECT_EQ(*ParseDType("bf16"), DType::kBF16);
  const auto refused = ParseDType("fp8");
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().message(), "dtype \"fp8\" is not one of f32, f16, bf16");
}

TEST(ConvertElementsSpec, ConvertsBetweenEveryPairOfTypes) {
  const float source[] = {0.0f, 1.5f, -2.25f, 1024.0f};
  for (DType from : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (DType to : {DType::kF32, DType::kF16, DType::kBF16}) {
      SCOPED_TRACE(std::string(DTypeName(from)) + " to " + DTypeName(to));
      uint8_t narrow[16];
      uint8_t wide[16];
      float back[4];
      ConvertElements(source, DType::kF32, narrow, from, 4);
      ConvertElements(narrow, from, wide, to, 4);
      ConvertElements(wide, to, back, DType::kF32, 4);
      EXPECT_EQ(std::memcmp(back, source, sizeof(source)), 0);
    }
  }
}

}  // namespace
}  // namespace pbs
