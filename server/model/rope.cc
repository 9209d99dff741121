#include "server/model/rope.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

namespace pbs {
namespace {

constexpr double kTwoPi = 2 * std::numbers::pi;

// Long wavelengths are stretched by the factor, short ones kept, those between blended.
double Llama3Frequency(const RopeConfig& rope, double frequency) {
  const auto original = static_cast<double>(rope.original_max_position);
  const double wavelength = kTwoPi / frequency;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * frequency / rope.factor + smooth * frequency;
}

// The dimension that turns `rotations` times over the original context.
double YarnDimension(const RopeConfig& rope, int32_t head_dim, double rotations) {
  const auto original = static_cast<double>(rope.original_max_position);
  return head_dim * std::log(original / (rotations * kTwoPi)) /
         (2 * std::log(rope.theta));
}

struct YarnRamp {
  double low = 0;
  double high = 0;

  // 0: keep the frequency; 1: divide it by the factor.
  double At(int32_t i) const { return std::clamp((i - low) / (high - low), 0.0, 1.0); }
};

YarnRamp MakeYarnRamp(const RopeConfig& rope, int32_t head_dim) {
  double low = YarnDimension(rope, head_dim, rope.beta_fast);
  double high = YarnDimension(rope, head_dim, rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;  // as published, against a division by zero
  return {low, high};
}

}  // namespace

std::vector<double> InverseFrequencies(const RopeConfig& rope, int32_t head_dim) {
  const YarnRamp ramp =
      rope.type == RopeType::kYarn ? MakeYarnRamp(rope, head_dim) : YarnRamp();
  std::vector<double> frequencies(static_cast<size_t>(head_dim / 2));
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    const double plain = std::pow(rope.theta, -2.0 * i / head_dim);
    double& frequency = frequencies[i];
    switch (rope.type) {
      case RopeType::kDefault:
        frequency = plain;
        break;
      case RopeType::kLinear:
        frequency = plain / rope.factor;
        break;
      case RopeType::kLlama3:
        frequency = Llama3Frequency(rope, plain);
        break;
      case RopeType::kYarn:
        frequency = plain / rope.factor * ramp.At(i) + plain * (1 - ramp.At(i));
        break;
    }
  }
  return frequencies;
}

}  // namespace pbs
