// SwiGLU: y = silu(gate) * up, of the fused gate and up projection's output.
#pragma once

#include <cstdint>

#include "cuda/model/model_params.h"
#include "cuda/model/quads.h"

namespace pbs::cuda {

// Grid [rows].
struct GateRows {
  static constexpr int kThreads = 256;

  PBS_DEVICE static void Run(const GateRowsParams& params) {
    const int64_t row = BlockIndex();
    const int64_t first = row * 2 * params.quads;
    for (int quad = ThreadIndex(); quad < params.quads; quad += kThreads) {
      Quad gate = LoadQuad(params.gate_up, params.dtype, first + quad);
      Quad up = LoadQuad(params.gate_up, params.dtype, first + params.quads + quad);
      if (params.bias != nullptr) {
        Add(gate, LoadQuad(params.bias, DType::kF32, quad));
        Add(up, LoadQuad(params.bias, DType::kF32, params.quads + quad));
      }
      PBS_UNROLL
      for (int i = 0; i < kQuad; ++i) {
        up.x[i] *= gate.x[i] / (1.0f + Exp2(-gate.x[i] * kLog2E));
      }
      StoreQuad(params.y, params.dtype, row * params.y_stride_quads + quad, up);
    }
  }

 private:
  PBS_DEVICE static void Add(Quad& x, const Quad& y) {
    PBS_UNROLL
    for (int i = 0; i < kQuad; ++i) x.x[i] += y.x[i];
  }
};

}  // namespace pbs::cuda
