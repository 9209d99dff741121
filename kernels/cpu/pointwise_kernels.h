// The inner loops of the pointwise operations, one table per instruction set. All
// arithmetic is f32; `Element` is the stored type of a row.
//
// Files built with ISA flags include this header, so it includes no library header
// except <stdint.h>: the linker must never keep an inline function that was compiled
// for AVX-512.
//
// Threading: stateless. Memory: allocates nothing. Pointers need no alignment beyond
// that of their element type; rows may have any length.
#pragma once

#include <stdint.h>

namespace pbs::cpu {

// Values equal pbs::DType.
enum class Element : uint8_t { kF32 = 0, kF16 = 1, kBf16 = 2 };

struct PointwiseKernels {
  void (*widen)(const void* source, Element type, float* target, int64_t count);
  void (*narrow)(const float* source, void* target, Element type, int64_t count);

  // y = x / sqrt(mean(x^2) + epsilon) * weight
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t count,
                   void* y, Element y_type);
  // Rotates pairs (i, i + head_dim / 2) of one head, after an RMS norm where `norm` is
  // not null. head_dim is a multiple of 32.
  void (*rotate_head)(const void* x, Element x_type, const float* norm, float epsilon,
                      const float* cosines, const float* sines, int64_t head_dim,
                      void* y, Element y_type);

  // Last steps of a linear layer; `bias` may be null. y = sums + bias
  void (*store_sums)(const float* sums, const float* bias, int64_t count, void* y,
                     Element y_type);
  // y += sums + bias
  void (*add_sums)(const float* sums, const float* bias, int64_t count, float* y);
  // y = silu(gate + gate_bias) * (up + up_bias)
  void (*swiglu_sums)(const float* gate, const float* gate_bias, const float* up,
                      const float* up_bias, int64_t count, void* y, Element y_type);

  // y[r, j] = dot(x[r], w[j]); x [rows, depth], w [cols, depth], y rows y_stride apart.
  void (*row_dots)(const float* x, int64_t rows, const void* w, Element w_type,
                   int64_t cols, int64_t depth, float* y, int64_t y_stride);
};

extern const PointwiseKernels kScalarPointwise;
extern const PointwiseKernels kAvx2Pointwise;
extern const PointwiseKernels kAvx512Pointwise;

}  // namespace pbs::cpu
