// Output heads: a few f32 rows times a weight in its stored layout.
#pragma once

#include <cstdint>

#include "cuda/model/quads.h"

namespace pbs::cuda {

struct DotRowsParams {
  const float* x;      // [rows, 4 quads]
  const void* weight;  // [vocab, 4 quads]
  float* y;            // [rows, vocab]
  int32_t rows;
  int32_t quads;
  int32_t vocab;
  DType weight_dtype;
};

// Each warp has a row of the weight, which it reads once for up to kRowsAtOnce rows of
// x. Grid [ceil(vocab / warps), ceil(rows / kRowsAtOnce)]; the second index changes
// slowest.
struct DotRows {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRowsAtOnce = 8;

  PBS_HOST_DEVICE static constexpr int BlocksOfVocab(int32_t vocab) {
    return (vocab + kWarps - 1) / kWarps;
  }
  static constexpr int64_t Blocks(const DotRowsParams& params) {
    const int64_t groups = (params.rows + kRowsAtOnce - 1) / kRowsAtOnce;
    return groups * BlocksOfVocab(params.vocab);
  }

  PBS_DEVICE static void Run(const DotRowsParams& params) {
    const int of_vocab = BlocksOfVocab(params.vocab);
    const int word = BlockIndex() % of_vocab * kWarps + ThreadIndex() / 32;
    const int first = BlockIndex() / of_vocab * kRowsAtOnce;
    if (word >= params.vocab) return;  // a whole warp
    const int count =
        params.rows - first < kRowsAtOnce ? params.rows - first : kRowsAtOnce;
    float sums[kRowsAtOnce] = {};
    for (int quad = ThreadIndex() % 32; quad < params.quads; quad += 32) {
      const Quad w = LoadQuad(params.weight, params.weight_dtype,
                              int64_t{word} * params.quads + quad);
      PBS_UNROLL
      for (int row = 0; row < kRowsAtOnce; ++row) {
        if (row >= count) continue;
        const Quad x =
            LoadQuad(params.x, DType::kF32, int64_t{first + row} * params.quads + quad);
        PBS_UNROLL
        for (int i = 0; i < kQuad; ++i) sums[row] += x.x[i] * w.x[i];
      }
    }
    PBS_UNROLL
    for (int row = 0; row < kRowsAtOnce; ++row) {
      const float sum = SumLanes(sums[row], 32);
      if (row < count && ThreadIndex() % 32 == 0) {
        StoreGlobal(params.y + int64_t{first + row} * params.vocab + word, sum);
      }
    }
  }
};

}  // namespace pbs::cuda
