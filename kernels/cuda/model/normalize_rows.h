// RMSNorm of the residual stream.
#pragma once

#include <cstdint>

#include "cuda/model/quads.h"

namespace pbs::cuda {

struct NormalizeRowsParams {
  const float* x;       // [rows, 4 quads]
  const float* weight;  // [4 quads]
  void* y;
  float epsilon;
  int32_t quads;
  DType y_dtype;
};

// y = x / sqrt(mean(x^2) + epsilon) * weight. Grid [rows]. The row is read twice, the
// second time from the first-level cache.
struct NormalizeRows {
  static constexpr int kThreads = 256;
  static constexpr int64_t kSharedBytes = kThreads / 32 * sizeof(float);

  PBS_DEVICE static void Run(const NormalizeRowsParams& params) {
    const int64_t first = int64_t{BlockIndex()} * params.quads;
    float squares = 0;
    for (int quad = ThreadIndex(); quad < params.quads; quad += kThreads) {
      const Quad x = LoadQuad(params.x, DType::kF32, first + quad);
      PBS_UNROLL
      for (int i = 0; i < kQuad; ++i) squares += x.x[i] * x.x[i];
    }
    const float mean = Sum(squares) / static_cast<float>(kQuad * params.quads);
    const float factor = 1.0f / Sqrt(mean + params.epsilon);
    for (int quad = ThreadIndex(); quad < params.quads; quad += kThreads) {
      Quad x = LoadQuad(params.x, DType::kF32, first + quad);
      const Quad weight = LoadQuad(params.weight, DType::kF32, quad);
      PBS_UNROLL
      for (int i = 0; i < kQuad; ++i) x.x[i] *= factor * weight.x[i];
      StoreQuad(params.y, params.y_dtype, first + quad, x);
    }
  }

 private:
  // Sum over the thread block, always in the same order.
  PBS_DEVICE static float Sum(float value) {
    auto* of_warps = reinterpret_cast<float*>(SharedMemory());
    value = SumLanes(value, 32);
    if (ThreadIndex() % 32 == 0) StoreShared(of_warps + ThreadIndex() / 32, value);
    SyncThreads();
    float sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += LoadShared(of_warps + warp);
    return sum;
  }
};

}  // namespace pbs::cuda
