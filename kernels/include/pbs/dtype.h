// Element types and their scalar conversions.
//
// Half-precision values are held as their 16 bits. Conversions to half round to
// nearest, ties to even, as IEEE 754 and the tensor libraries do; NaN stays NaN
// (quiet).
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "pbs/status.h"

namespace pbs {

enum class DType : uint8_t { kF32, kF16, kBF16 };

struct f16 {
  uint16_t bits = 0;
};
struct bf16 {
  uint16_t bits = 0;
};

constexpr int64_t DTypeBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// "f32", "f16", "bf16".
const char* DTypeName(DType dtype);
// The inverse; InvalidArgument names the accepted spellings.
StatusOr<DType> ParseDType(std::string_view name);

constexpr float ToFloat(float value) { return value; }

constexpr float ToFloat(bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

constexpr float ToFloat(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const uint32_t fraction = value.bits & 0x3FFu;
  if (exponent == 0x1F) {
    return std::bit_cast<float>(sign | 0x7F800000u | (fraction << 13));
  }
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24 is exact in f32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

constexpr bf16 ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  }
  return bf16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

constexpr f16 ToF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return f16{static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    return f16{static_cast<uint16_t>(sign | 0x7C00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal half or zero
    // Adding 0.5 aligns the wanted bits at the bottom of the f32 fraction and rounds.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    const uint32_t fraction = std::bit_cast<uint32_t>(aligned) - 0x3F000000u;
    return f16{static_cast<uint16_t>(sign | fraction)};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

template <class T>
constexpr T FromFloat(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, f16>) {
    return ToF16(value);
  } else {
    return ToBf16(value);
  }
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, float> ? DType::kF32
                           : std::is_same_v<T, f16> ? DType::kF16
                                                    : DType::kBF16;

// Calls `visitor` with a value of the element type of `dtype` (float, f16 or bf16).
template <class Visitor>
decltype(auto) VisitDType(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kF16:
      return visitor(f16{});
    case DType::kBF16:
      return visitor(bf16{});
    case DType::kF32:
      break;
  }
  return visitor(0.0f);
}

// Converts `count` elements; `source` and `target` must not overlap unless equal in
// address and type.
void ConvertElements(const void* source, DType source_dtype, void* target,
                     DType target_dtype, int64_t count);

}  // namespace pbs
