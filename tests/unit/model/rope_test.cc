// Spec: server/model/rope.h. Formulas written out again, and values that transformers
// 5.23 computes for the same settings.
#include "server/model/rope.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

namespace pbs {
namespace {

constexpr double kPi = std::numbers::pi;

RopeConfig Plain(double theta) {
  RopeConfig rope;
  rope.theta = theta;
  return rope;
}

RopeConfig Llama31() {
  RopeConfig rope = Plain(500000);
  rope.type = RopeType::kLlama3;
  rope.factor = 8;
  rope.low_freq_factor = 1;
  rope.high_freq_factor = 4;
  rope.original_max_position = 8192;
  return rope;
}

RopeConfig Yarn() {
  RopeConfig rope = Plain(1e6);
  rope.type = RopeType::kYarn;
  rope.factor = 4;
  rope.original_max_position = 32768;
  rope.beta_fast = 32;
  rope.beta_slow = 1;
  rope.truncate = true;
  return rope;
}

void ExpectFrequency(const std::vector<double>& actual, int index, double expected) {
  EXPECT_NEAR(actual[index] / expected, 1.0, 1e-12) << "dimension " << index;
}

// transformers computes in f32: agreement to its rounding.
void ExpectPublished(const std::vector<double>& actual, int index, double expected) {
  EXPECT_NEAR(actual[index] / expected, 1.0, 2e-6) << "dimension " << index;
}

TEST(InverseFrequenciesSpec, DefaultFallsGeometrically) {
  const auto w = InverseFrequencies(Plain(10000), 64);
  ASSERT_EQ(w.size(), 32u);
  for (int i = 0; i < 32; ++i) ExpectFrequency(w, i, std::exp(-std::log(1e4) * i / 32));
}

TEST(InverseFrequenciesSpec, LinearDividesEveryFrequency) {
  RopeConfig rope = Plain(10000);
  rope.type = RopeType::kLinear;
  rope.factor = 4;
  const auto w = InverseFrequencies(rope, 64);
  for (int i = 0; i < 32; ++i) {
    ExpectFrequency(w, i, std::exp(-std::log(1e4) * i / 32) / 4);
  }
}

TEST(InverseFrequenciesSpec, Llama3KeepsShortBlendsMiddleAndStretchesLongWaves) {
  const auto w = InverseFrequencies(Llama31(), 128);
  for (int i = 0; i < 64; ++i) {
    const double plain = std::exp(-std::log(5e5) * i / 64);
    const double turns = 8192 * plain / (2 * kPi);  // over the original context
    const double expected = turns > 4 ? plain
                            : turns < 1
                                ? plain / 8
                                : plain * ((turns - 1) / 3 + (1 - (turns - 1) / 3) / 8);
    ExpectFrequency(w, i, expected);
  }
}

TEST(InverseFrequenciesSpec, YarnRampsBetweenTwoDimensions) {
  const auto w = InverseFrequencies(Yarn(), 128);
  const auto dimension = [](double turns) {
    return 128 * std::log(32768 / (turns * 2 * kPi)) / (2 * std::log(1e6));
  };
  const double low = std::floor(dimension(32));
  const double high = std::ceil(dimension(1));
  for (int i = 0; i < 64; ++i) {
    const double plain = std::exp(-std::log(1e6) * i / 64);
    const double share = std::min(std::max((i - low) / (high - low), 0.0), 1.0);
    ExpectFrequency(w, i, plain * (1 - share) + plain / 4 * share);
  }
}

TEST(InverseFrequenciesSpec, YarnWithoutTruncationUsesTheExactBounds) {
  RopeConfig rope = Yarn();
  rope.truncate = false;
  const auto exact = InverseFrequencies(rope, 128);
  const auto truncated = InverseFrequencies(Yarn(), 128);
  EXPECT_EQ(exact[0], truncated[0]);
  EXPECT_NE(exact[30], truncated[30]);
}

TEST(InverseFrequenciesSpec, EqualsWhatTransformersComputes) {
  const auto llama = InverseFrequencies(Llama31(), 128);
  ExpectPublished(llama, 0, 1);
  ExpectPublished(llama, 1, 0.814617217);
  ExpectPublished(llama, 20, 0.0165604409);
  ExpectPublished(llama, 28, 0.00321144611);
  ExpectPublished(llama, 30, 0.00137189368);
  ExpectPublished(llama, 32, 0.000524846022);
  ExpectPublished(llama, 34, 0.000178507791);
  ExpectPublished(llama, 35, 9.55621217e-05);
  ExpectPublished(llama, 50, 4.41153452e-06);
  ExpectPublished(llama, 63, 3.06892588e-07);
  const auto yarn = InverseFrequencies(Yarn(), 128);
  ExpectPublished(yarn, 0, 1);
  ExpectPublished(yarn, 1, 0.805842221);
  ExpectPublished(yarn, 20, 0.0133352149);
  ExpectPublished(yarn, 23, 0.00697830599);
  ExpectPublished(yarn, 24, 0.00537532149);
  ExpectPublished(yarn, 30, 0.00106436096);
  ExpectPublished(yarn, 36, 0.000179841154);
  ExpectPublished(yarn, 39, 6.4903943e-05);
  ExpectPublished(yarn, 40, 4.44569851e-05);
  ExpectPublished(yarn, 50, 5.13381246e-06);
  ExpectPublished(yarn, 63, 3.10234441e-07);
}

}  // namespace
}  // namespace pbs
