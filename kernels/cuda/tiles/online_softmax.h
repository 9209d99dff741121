// Softmax of rows whose scores come block by block, in accumulator fragments. A thread
// holds two rows, `row` and `row` + 8. Its register 4 i + 2 r + c is column 8 i + 2
// (lane % 4) + c of row r.
#pragma once

#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

struct OnlineSoftmax {
  float max[2];
  float sum[2];     // sum over this thread's columns
  float shrink[2];  // the factor of the last block for earlier sums

  PBS_DEVICE void Reset() {
    max[0] = max[1] = -kInfinity;
    sum[0] = sum[1] = 0;
  }

  // Converts scores to probabilities relative to the largest score so far. kMasked: a
  // row may have seen no key yet.
  template <bool kMasked, int kScores>
  PBS_DEVICE void Add(float scale_log2, float (&scores)[kScores]) {
    PBS_UNROLL
    for (int r = 0; r < 2; ++r) {
      float top = max[r];
      PBS_UNROLL
      for (int i = 0; i < kScores / 4; ++i) {
        top = Max(top, Max(scores[i * 4 + 2 * r], scores[i * 4 + 2 * r + 1]));
      }
      top = Max(top, ShuffleXor(top, 1));
      top = Max(top, ShuffleXor(top, 2));
      const float shift = kMasked && top == -kInfinity ? 0.0f : top * scale_log2;
      shrink[r] = Exp2(max[r] * scale_log2 - shift);
      max[r] = top;
      float added = 0;
      PBS_UNROLL
      for (int i = 0; i < kScores / 4; ++i) {
        PBS_UNROLL
        for (int c = 0; c < 2; ++c) {
          float& score = scores[i * 4 + 2 * r + c];
          score = Exp2(score * scale_log2 - shift);
          added += score;
        }
      }
      sum[r] = sum[r] * shrink[r] + added;
    }
  }

  template <int kSums>
  PBS_DEVICE void Rescale(float (&out)[kSums]) const {
    PBS_UNROLL
    for (int i = 0; i < kSums; ++i) out[i] *= shrink[i / 2 % 2];
  }

  // Sum of the whole row r; all lanes call.
  PBS_DEVICE float RowSum(int r) const {
    float total = sum[r];
    total += ShuffleXor(total, 1);
    total += ShuffleXor(total, 2);
    return total;
  }
};

}  // namespace pbs::cuda
