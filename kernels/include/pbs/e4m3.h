// FP8 E4M3 without infinities ("e4m3fn"): 1 bit of sign, 4 of exponent, 3 of mantissa.
//
// Normal numbers are +-2^-6 .. +-448, subnormal ones multiples of 2^-9; 0x7F and 0xFF
// are NaN. Of a number x that rounds to a normal one, the error is at most |x| / 17; of
// one that rounds to a subnormal one it is at most 2^-10.
//
// Threading: pure functions.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace pbs {

inline constexpr float kE4m3Max = 448.0f;

// The number that a byte stands for; NaN for 0x7F and 0xFF.
constexpr float E4m3ToFloat(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7Fu;
  if (magnitude == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude < 8) {  // zero and subnormals: exact in f32
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
}

// The nearest byte, ties to the even one; numbers beyond +-448 become +-448, and NaN
// and infinities NaN. The sign stays. Without branches, so that compilers make vectors
// of a loop over it.
constexpr uint8_t ToE4m3(float value) {
  constexpr int32_t kInfinity = 0x7F800000;
  constexpr int32_t kMax = std::bit_cast<int32_t>(kE4m3Max);
  constexpr int32_t kNormalMin = 121 << 23;  // 2^-6
  // Adding it aligns multiples of 2^-9 at the bottom of the f32 fraction, and rounds.
  constexpr float kAlign = 0x1p14f;
  const auto bits = std::bit_cast<int32_t>(value);
  const int32_t magnitude = bits & 0x7FFFFFFF;
  const int32_t bounded = magnitude < kMax ? magnitude : kMax;
  const int32_t normal =
      ((bounded + 0x7FFFF + ((bounded >> 20) & 1)) >> 20) - (120 << 3);
  const int32_t subnormal =
      std::bit_cast<int32_t>(std::bit_cast<float>(bounded) + kAlign) -
      std::bit_cast<int32_t>(kAlign);
  // Masks: compilers make branches of ?: around floating-point operations.
  const int32_t is_normal = -static_cast<int32_t>(bounded >= kNormalMin);
  const int32_t is_finite = -static_cast<int32_t>(magnitude < kInfinity);
  const int32_t finite = (normal & is_normal) | (subnormal & ~is_normal);
  const int32_t number = (finite & is_finite) | (0x7F & ~is_finite);
  return static_cast<uint8_t>(number | ((bits >> 24) & 0x80));
}

}  // namespace pbs
