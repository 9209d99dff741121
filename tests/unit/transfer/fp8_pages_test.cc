// Spec: server/transfer/fp8_pages.h, pbs/e4m3.h.
#include "server/transfer/fp8_pages.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "pbs/e4m3.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The nearest byte by trying all of them, in f64.
uint8_t Nearest(float value) {
  uint8_t best = 0;
  for (int code = 0; code < 0x7F; ++code) {
    const auto error = [&](int bits) {
      return std::abs(double{E4m3ToFloat(static_cast<uint8_t>(bits))} -
                      std::abs(double{value}));
    };
    if (error(code) < error(best) || (error(code) == error(best) && code % 2 == 0)) {
      best = static_cast<uint8_t>(code);
    }
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

TEST(E4m3Spec, EveryNumberIsItsOwnByte) {
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<uint8_t>(bits);
    EXPECT_EQ(ToE4m3(E4m3ToFloat(byte)) & 0x7F, byte & 0x7F) << "byte " << bits;
    if ((bits & 0x7F) != 0x7F) {
      EXPECT_EQ(ToE4m3(E4m3ToFloat(byte)), byte) << "byte " << bits;
    }
  }
}

TEST(E4m3Spec, RoundsToTheNearestAndTiesToEven) {
  for (int code = 0; code < 0x7E; ++code) {
    const float low = E4m3ToFloat(static_cast<uint8_t>(code));
    const float high = E4m3ToFloat(static_cast<uint8_t>(code + 1));
    const float middle = (low + high) / 2;
    for (float value :
         {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInfinity)}) {
      EXPECT_EQ(ToE4m3(value), Nearest(value)) << value;
      EXPECT_EQ(ToE4m3(-value), Nearest(-value)) << value;
    }
  }
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 rng(seed);
    for (int i = 0; i < 500; ++i) {
      const float value = std::ldexp(static_cast<float>(rng() % 4096) - 2048,
                                     static_cast<int>(rng() % 26) - 22);
      ASSERT_EQ(ToE4m3(value), Nearest(value)) << value << " seed " << seed;
    }
  }
}

TEST(E4m3Spec, WhatTheFormatLacksSaturatesOrIsNan) {
  EXPECT_EQ(ToE4m3(1e9f), 0x7E);
  EXPECT_EQ(ToE4m3(-464.0f), 0xFE);
  EXPECT_EQ(ToE4m3(kNan) & 0x7F, 0x7F);
  EXPECT_EQ(ToE4m3(kInfinity), 0x7F);
  EXPECT_EQ(ToE4m3(-kInfinity), 0xFF);
  EXPECT_EQ(ToE4m3(0.0f), 0x00);
  EXPECT_EQ(ToE4m3(-0.0f), 0x80);
  EXPECT_EQ(ToE4m3(std::numeric_limits<float>::denorm_min()), 0x00);
}

// ---- pages

struct PageCase {
  const char* name;
  std::function<float(std::mt19937&, int)> element;  // of a page, by index
};

class Fp8PageSpec : public testing::TestWithParam<PageCase> {};

// The elements of a page in `held`, and as f32.
std::vector<float> MakePage(const PageCase& page, DType dtype, uint32_t seed,
                            std::vector<std::byte>* held) {
  std::mt19937 rng(seed);
  constexpr int kCount = 16 * 64 + 5;  // not a multiple of a vector
  std::vector<float> values;
  for (int i = 0; i < kCount; ++i) values.push_back(page.element(rng, i));
  held->resize(values.size() * static_cast<size_t>(DTypeBytes(dtype)));
  ConvertElements(values.data(), DType::kF32, held->data(), dtype, kCount);
  ConvertElements(held->data(), dtype, values.data(), DType::kF32, kCount);
  return values;
}

TEST_P(Fp8PageSpec, TheErrorIsWithinTheStatedBound) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (uint32_t seed = 0; seed < 8; ++seed) {
      SCOPED_TRACE(testing::Message() << DTypeName(dtype) << " seed " << seed);
      std::vector<std::byte> held;
      const std::vector<float> values = MakePage(GetParam(), dtype, seed, &held);
      const auto count = static_cast<int64_t>(values.size());
      const float scale = PageScale(held.data(), dtype, count);
      std::vector<uint8_t> bytes(values.size());
      EncodeFp8(held.data(), dtype, count, scale, bytes.data());
      float greatest = 0;
      for (size_t i = 0; i < values.size(); ++i) {
        const float value = values[i];
        const float back = E4m3ToFloat(bytes[i]) * scale;
        if (!std::isfinite(value)) {
          ASSERT_TRUE(std::isnan(back)) << i;
          continue;
        }
        greatest = std::max(greatest, std::abs(value));
        const double bound =
            std::max(std::abs(double{value}) / 16, double{scale} * 0x1p-10);
        // Quotient and product are rounded to f32.
        ASSERT_LE(std::abs(double{value} - double{back}), bound * (1 + 0x1p-20))
            << value << " became " << back << ", scale " << scale;
        ASSERT_EQ(bytes[i], Nearest(scale > 0 ? value / scale : value))
            << value << ", scale " << scale;
      }
      if (greatest == 0) {
        EXPECT_EQ(scale, 0);
      } else {
        EXPECT_EQ(scale, std::max(greatest / 448, 0x1p-126f));
      }
    }
  }
}

float Normal(std::mt19937& rng) { return std::normal_distribution<float>()(rng); }

INSTANTIATE_TEST_SUITE_P(
    Pages, Fp8PageSpec,
    testing::Values(
        PageCase{"random", [](auto& rng, int) { return Normal(rng); }},
        PageCase{"tiny", [](auto& rng, int) { return Normal(rng) * 1e-6f; }},
        PageCase{"huge", [](auto& rng, int) { return Normal(rng) * 1e4f; }},
        PageCase{"beyond_f16", [](auto& rng, int) { return Normal(rng) * 1e34f; }},
        PageCase{"denormal", [](auto& rng, int) { return Normal(rng) * 1e-40f; }},
        PageCase{"least_numbers",
                 [](auto& rng, int) {
                   return std::bit_cast<float>(static_cast<uint32_t>(rng() % 3));
                 }},
        PageCase{"f16_denormal", [](auto& rng, int) { return Normal(rng) * 1e-7f; }},
        PageCase{"zero", [](auto&, int i) { return i % 2 == 0 ? 0.0f : -0.0f; }},
        PageCase{"one_outlier",
                 [](auto& rng, int i) { return i == 7 ? 3e4f : Normal(rng); }},
        PageCase{"an_outlier_that_hides_all",
                 [](auto& rng, int i) { return i == 7 ? -6e4f : Normal(rng) * 1e-2f; }},
        PageCase{"powers_of_two",
                 [](auto& rng, int) {
                   return std::ldexp(1.0f, static_cast<int>(rng() % 28) - 14);
                 }},
        PageCase{"nan_and_infinities",
                 [](auto& rng, int i) {
                   if (i == 3) return kNan;
                   if (i == 4) return kInfinity;
                   return i == 5 ? -kInfinity : Normal(rng);
                 }},
        PageCase{"nothing_finite", [](auto&, int) { return kInfinity; }}),
    testing_support::CaseName());

TEST(Fp8ZeroSpec, SignsOfZerosStay) {
  const std::vector<float> zeros = {0.0f, -0.0f};
  std::vector<uint8_t> bytes(2);
  EncodeFp8(zeros.data(), DType::kF32, 2, PageScale(zeros.data(), DType::kF32, 2),
            bytes.data());
  EXPECT_EQ(bytes, (std::vector<uint8_t>{0x00, 0x80}));
}

}  // namespace
}  // namespace pbs::server
