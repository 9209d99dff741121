// Tile kernels in plain C++, for any CPU: the floor that always works.
#include <cmath>

#include "cpu/tile_kernels.h"
#include "pbs/dtype.h"

namespace pbs::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 1;
  float v;

  static Vec Load(const float* p) { return {*p}; }
  void Store(float* p) const { *p = v; }
  static Vec Set1(float x) { return {x}; }
  static Vec Zero() { return {0.0f}; }
  static Vec Fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
  static Vec Add(Vec a, Vec b) { return {a.v + b.v}; }
  static Vec Sub(Vec a, Vec b) { return {a.v - b.v}; }
  static Vec Mul(Vec a, Vec b) { return {a.v * b.v}; }
  static Vec Div(Vec a, Vec b) { return {a.v / b.v}; }
  static Vec Max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  float HorizontalMax() const { return v; }
  float HorizontalAdd() const { return v; }
  static Vec Exp2(Vec x) { return {x.v < -126.0f ? 0.0f : std::exp2(x.v)}; }
  static Vec KeepSeen(Vec scores, const int32_t* positions, int32_t last) {
    return {*positions <= last ? scores.v : -INFINITY};
  }
};

constexpr int kTileRows = 4;
constexpr int kTileVecs = 16;
constexpr bool kHasPairs = false;
[[maybe_unused]] inline void StorePairs(uint32_t*, Vec, Vec) {}

// To f16 or bf16.
template <ProxyRounding kRounding>
inline Vec RoundTo(Vec x) {
  return {kRounding == ProxyRounding::kF16 ? ToFloat(ToF16(x.v))
                                           : ToFloat(ToBf16(x.v))};
}

void F16ToF32(const uint16_t* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = ToFloat(f16{source[i]});
}
void Bf16ToF32(const uint16_t* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = ToFloat(bf16{source[i]});
}
void F32ToF16(const float* source, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = ToF16(source[i]).bits;
}
void F32ToBf16(const float* source, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = ToBf16(source[i]).bits;
}

#include "cpu/tile_kernels_impl.h"

}  // namespace

const TileKernels kScalarKernels = MakeKernels("scalar", nullptr);

}  // namespace pbs::cpu
