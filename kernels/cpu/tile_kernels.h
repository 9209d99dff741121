// The inner loops of CPU attention, one table per instruction set.
//
// Matrix operands consist of 32-bit *words*: one f32, or two bf16 that are adjacent
// along the depth of the product. `a` is row-major. `b` is packed in panels: panel p
// holds columns [p * panel_width, ...) as [depth][width] words, width being panel_width
// or, in the last panel, the rest. Column counts are multiples of 16.
//
// Files built with ISA flags include this header, so it includes no library header
// except <stdint.h>: the linker must never keep an inline function that was compiled
// for AVX-512 for the whole program.
//
// Threading: stateless. Memory: allocates nothing. Pointers need no alignment beyond
// that of their element type.
#pragma once

#include <stdint.h>

namespace pbs::cpu {

// One block of scores in the online softmax (docs/KERNELS.md, "CPU").
struct SoftmaxTile {
  int32_t rows;
  int32_t cols;      // a multiple of 16
  int32_t head_dim;  // a multiple of 32; 0: probabilities only, `out` is not used
  float scale;       // log2(e) / sqrt(head_dim)
  // Original positions of the columns, or null when every row sees every column. Row r
  // sees a column whose position is at most first_query + r.
  const int32_t* positions;
  int32_t first_query;
  // [rows, cols] in: raw dot products. Out: probabilities relative to row_max, unless
  // `pairs` is set.
  float* scores;
  uint32_t* pairs;  // [rows, cols / 2] out as bf16 pairs, or null
  // Running state, in units of log2: maximum, sum of probabilities, and the output
  // accumulators [rows, head_dim], which are rescaled when the maximum rises.
  float* row_max;
  float* row_sum;
  float* out;
};

// Rounding of dot products and of their quotients by sqrt(head_dim) before the softmax,
// as in the published code.
enum class ProxyRounding : int32_t { kNone, kF16, kBf16 };

// Scores of `keys` keys (rows) against `proxies` proxy queries (columns).
struct ProxyTile {
  int32_t keys;
  int32_t proxies;  // a multiple of 16; surplus columns are ignored by the caller
  float scale;      // log2(e) / sqrt(head_dim)
  ProxyRounding rounding;
  float sqrt_head_dim;
  float* scores;    // [keys, proxies] in: raw; out: 2^(score - tile_max)
  float* tile_max;  // [proxies] out, in units of log2
  float* tile_sum;  // [proxies] out
};

// c[rows, cols] = a[rows, depth] b (+ c when accumulate); strides in words.
struct Product {
  int32_t rows;
  int32_t cols;
  int32_t depth;
  const uint32_t* a;
  int64_t a_stride;
  const uint32_t* b;
  float* c;
  int64_t c_stride;
  bool accumulate = false;
};
using GemmFunction = void (*)(const Product& product);

struct TileKernels {
  const char* isa_name;  // IsaName() of the table's ISA
  int32_t panel_width;

  // f32 words.
  GemmFunction gemm;
  // bf16 pairs; null where the ISA has no such product.
  GemmFunction gemm_pairs;

  void (*softmax)(const SoftmaxTile& tile);
  void (*proxy_softmax)(const ProxyTile& tile);
  // sums[key] += sum over proxies of scores[key, proxy] * weights[proxy]
  void (*weighted_sums)(int32_t keys, int32_t proxies, const float* scores,
                        const float* weights, float* sums);

  // Rows of `count` elements, a multiple of 16.
  void (*f16_to_f32)(const uint16_t* source, float* target, int64_t count);
  void (*bf16_to_f32)(const uint16_t* source, float* target, int64_t count);
  void (*f32_to_f16)(const float* source, uint16_t* target, int64_t count);
  void (*f32_to_bf16)(const float* source, uint16_t* target, int64_t count);
  // target[i] += source[i]; target[i] /= divisor
  void (*add)(const float* source, float* target, int64_t count);
  void (*divide)(float divisor, float* target, int64_t count);
};

extern const TileKernels kScalarKernels;
extern const TileKernels kAvx2Kernels;
extern const TileKernels kAvx512Kernels;
extern const TileKernels kAvx512Bf16Kernels;

}  // namespace pbs::cpu
