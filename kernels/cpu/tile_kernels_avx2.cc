// Tile kernels for AVX2 with FMA and F16C: a 6 x 2 register tile (12 accumulators, two
// columns of b and one broadcast in 16 registers).
#include <immintrin.h>

#include "cpu/tile_kernels.h"

namespace pbs::cpu {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec Load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void Store(float* p) const { _mm256_storeu_ps(p, v); }
  static Vec Set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec Zero() { return {_mm256_setzero_ps()}; }
  static Vec Fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec Add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec Sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec Mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec Div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }

  float HorizontalMax() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  float HorizontalAdd() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  // As in the AVX-512 table; 2^n by building the exponent bits.
  static Vec Exp2(Vec x) {
    const __m256 normal = _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
    const __m256 n =
        _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 f = _mm256_sub_ps(x.v, n);
    __m256 p = _mm256_set1_ps(1.534580806e-04f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.339993090e-03f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.618489072e-03f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.550328642e-02f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.402264625e-01f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.931471825e-01f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return {_mm256_and_ps(normal, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)))};
  }

  static Vec KeepSeen(Vec scores, const int32_t* positions, int32_t last) {
    const __m256i later = _mm256_cmpgt_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(positions)),
        _mm256_set1_epi32(last));
    return {_mm256_blendv_ps(scores.v, _mm256_set1_ps(-__builtin_inff()),
                             _mm256_castsi256_ps(later))};
  }
};

constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;
constexpr bool kHasPairs = false;
[[maybe_unused]] inline void StorePairs(uint32_t*, Vec, Vec) {}

// bf16 bits of 8 floats, in the low half of each 32-bit lane.
inline __m256i Bf16Words(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd =
      _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 kept =
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
}

// To f16 or bf16.
template <ProxyRounding kRounding>
inline Vec RoundTo(Vec x) {
  if constexpr (kRounding == ProxyRounding::kF16) {
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT))};
  } else {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(Bf16Words(x.v), 16))};
  }
}

inline __m128i LoadHalves(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline void StoreHalves(uint16_t* p, __m128i x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
}

void F16ToF32(const uint16_t* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(LoadHalves(source + i)));
  }
}

void Bf16ToF32(const uint16_t* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i wide = _mm256_cvtepu16_epi32(LoadHalves(source + i));
    _mm256_storeu_ps(target + i, _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
  }
}

void F32ToF16(const float* source, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    StoreHalves(target + i, _mm256_cvtps_ph(_mm256_loadu_ps(source + i),
                                            _MM_FROUND_TO_NEAREST_INT));
  }
}

void F32ToBf16(const float* source, uint16_t* target, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i words = Bf16Words(_mm256_loadu_ps(source + i));
    StoreHalves(target + i, _mm_packus_epi32(_mm256_castsi256_si128(words),
                                             _mm256_extracti128_si256(words, 1)));
  }
}

#include "cpu/tile_kernels_impl.h"

}  // namespace

const TileKernels kAvx2Kernels = MakeKernels("avx2", nullptr);

}  // namespace pbs::cpu
