// Tile kernels for AVX512-BF16: as AVX-512, and products of bf16 pairs (vdpbf16ps:
// two multiply-adds per lane and instruction, f32 accumulators).
#include <immintrin.h>

#include "cpu/tile_kernels.h"

namespace pbs::cpu {
namespace {

#include "cpu/tile_kernels_avx512.inc"

constexpr int kTileRows = 6;
constexpr int kTileVecs = 4;
constexpr bool kHasPairs = true;

inline void StorePairs(uint32_t* pairs, Vec low, Vec high) {
  const __m512bh packed = _mm512_cvtne2ps_pbh(high.v, low.v);
  _mm512_storeu_si512(pairs, reinterpret_cast<const __m512i&>(packed));
}

#include "cpu/tile_kernels_impl.h"

#define PBS_UNROLL _Pragma("GCC unroll 16")

inline __m512bh AsPairs(__m512i bits) {
#if defined(__clang__)
  asm("" : "+v"(bits));  // clang 16 crashes when it sees where they come from
#endif
  return reinterpret_cast<__m512bh&>(bits);
}

template <int kRows, int kVecs>
inline void GemmPairsTile(int32_t depth, const uint32_t* a, int64_t a_stride,
                          const uint32_t* b, float* c, int64_t c_stride,
                          bool accumulate) {
  __m512 acc[kRows][kVecs];
  PBS_UNROLL for (int r = 0; r < kRows; ++r) {
    PBS_UNROLL for (int v = 0; v < kVecs; ++v) { acc[r][v] = _mm512_setzero_ps(); }
  }
  for (int32_t k = 0; k < depth; ++k) {
    __m512i column[kVecs];
    PBS_UNROLL for (int v = 0; v < kVecs; ++v) {
      column[v] = _mm512_loadu_si512(b + k * (kVecs * 16) + v * 16);
    }
    PBS_UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512bh x =
          AsPairs(_mm512_set1_epi32(static_cast<int>(a[r * a_stride + k])));
      PBS_UNROLL for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], x, AsPairs(column[v]));
      }
    }
  }
  PBS_UNROLL for (int r = 0; r < kRows; ++r) {
    PBS_UNROLL for (int v = 0; v < kVecs; ++v) {
      float* at = c + r * c_stride + v * 16;
      if (accumulate) acc[r][v] = _mm512_add_ps(acc[r][v], _mm512_loadu_ps(at));
      _mm512_storeu_ps(at, acc[r][v]);
    }
  }
}

template <int kRows, int kVecs>
void GemmPairsPanel(int32_t rows, int32_t depth, const uint32_t* a, int64_t a_stride,
                    const uint32_t* b, float* c, int64_t c_stride, bool accumulate) {
  int32_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    GemmPairsTile<kRows, kVecs>(depth, a + row * a_stride, a_stride, b,
                                c + row * c_stride, c_stride, accumulate);
  }
  if constexpr (kRows > 1) {
    if (row < rows) {
      GemmPairsPanel<kRows - 1, kVecs>(rows - row, depth, a + row * a_stride, a_stride,
                                       b, c + row * c_stride, c_stride, accumulate);
    }
  }
}

template <int kVecs>
void GemmPairsLastPanel(const Product& x, int32_t col, int32_t width,
                        const uint32_t* b) {
  if (width == kVecs * 16) {
    GemmPairsPanel<kTileRows, kVecs>(x.rows, x.depth, x.a, x.a_stride, b, x.c + col,
                                     x.c_stride, x.accumulate);
  } else if constexpr (kVecs > 1) {
    GemmPairsLastPanel<kVecs - 1>(x, col, width, b);
  }
}

void GemmPairs(const Product& x) {
  for (int32_t col = 0; col < x.cols; col += kPanelWidth) {
    const int32_t width = x.cols - col < kPanelWidth ? x.cols - col : kPanelWidth;
    GemmPairsLastPanel<kTileVecs>(x, col, width, x.b + int64_t{col} * x.depth);
  }
}

#undef PBS_UNROLL

}  // namespace

const TileKernels kAvx512Bf16Kernels = MakeKernels("avx512_bf16", GemmPairs);

}  // namespace pbs::cpu
