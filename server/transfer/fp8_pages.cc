#include "server/transfer/fp8_pages.h"

#include <algorithm>
#include <bit>
#include <cstdint>

#include "pbs/e4m3.h"

namespace pbs::server {
namespace {

// The bits of an element as a signed integer, and those of the infinity of its type.
// The magnitudes of floating-point numbers are in the order of their bits.
int32_t BitsOf(float value) { return std::bit_cast<int32_t>(value); }
int16_t BitsOf(f16 value) { return static_cast<int16_t>(value.bits); }
int16_t BitsOf(bf16 value) { return static_cast<int16_t>(value.bits); }
constexpr int32_t InfinityOf(float) { return 0x7F800000; }
constexpr int16_t InfinityOf(f16) { return 0x7C00; }
constexpr int16_t InfinityOf(bf16) { return 0x7F80; }

float FromBits(int32_t bits, float) { return std::bit_cast<float>(bits); }
float FromBits(int16_t bits, f16) { return ToFloat(f16{static_cast<uint16_t>(bits)}); }
float FromBits(int16_t bits, bf16) {
  return ToFloat(bf16{static_cast<uint16_t>(bits)});
}

template <class T>
float GreatestMagnitude(const T* elements, int64_t count) {
  using Bits = decltype(BitsOf(T{}));
  constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 1)));
  Bits greatest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<Bits>(BitsOf(elements[i]) & kMagnitude);
    const Bits finite = magnitude < InfinityOf(T{}) ? magnitude : Bits{0};
    greatest = std::max(greatest, finite);
  }
  return FromBits(greatest, T{});
}

// ToFloat() without branches.
float Widen(float value) { return value; }
float Widen(bf16 value) { return ToFloat(value); }
float Widen(f16 value) {
  const int32_t magnitude = value.bits & 0x7FFF;
  const int32_t bits = magnitude << 13;
  const int32_t rebias = 112 << 23;
  // Masks: compilers make branches of ?: around floating-point operations.
  const int32_t is_finite = -static_cast<int32_t>(magnitude < 0x7C00);
  const int32_t is_normal = -static_cast<int32_t>(magnitude >= 0x0400);
  const int32_t normal = bits + rebias + (rebias & ~is_finite);
  const float tiny = static_cast<float>(magnitude) * 0x1p-24f;
  const int32_t number =
      (normal & is_normal) | (std::bit_cast<int32_t>(tiny) & ~is_normal);
  const int32_t sign =
      static_cast<int32_t>(static_cast<int16_t>(value.bits)) & INT32_MIN;
  return std::bit_cast<float>(number | sign);
}

template <class T>
[[gnu::always_inline]] inline void EncodeAll(const T* elements, int64_t count,
                                             float divisor, uint8_t* target) {
  for (int64_t i = 0; i < count; ++i) {
    target[i] = ToE4m3(Widen(elements[i]) / divisor);
  }
}

#if defined(__x86_64__)
// The same operations on more numbers at once: no result differs.
template <class T>
[[gnu::target("avx2")]] void EncodeAvx2(const T* elements, int64_t count, float divisor,
                                        uint8_t* target) {
  EncodeAll(elements, count, divisor, target);
}
#endif

template <class T>
void Encode(const T* elements, int64_t count, float divisor, uint8_t* target) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return EncodeAvx2(elements, count, divisor, target);
#endif
  EncodeAll(elements, count, divisor, target);
}

}  // namespace

float PageScale(const void* elements, DType dtype, int64_t count) {
  constexpr float kScaleMin = 0x1p-126f;
  const float greatest = VisitDType(dtype, [&](auto type) {
    return GreatestMagnitude(static_cast<const decltype(type)*>(elements), count);
  });
  return greatest > 0 ? std::max(greatest / kE4m3Max, kScaleMin) : 0;
}

void EncodeFp8(const void* elements, DType dtype, int64_t count, float scale,
               uint8_t* target) {
  const float divisor = scale > 0 ? scale : 1;
  VisitDType(dtype, [&](auto type) {
    Encode(static_cast<const decltype(type)*>(elements), count, divisor, target);
  });
}

}  // namespace pbs::server
