// Parameters of the mean correction (correct_by_means.h, pool_means.h).
#pragma once

#include <cstdint>

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/host_device.h"
#include "cuda/selection/selection_params.h"
#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

enum class MeanOperand { kKeys, kValues };
constexpr int kMeanOperands = 2;
constexpr int kMeansTogether = 32;  // means of one step

struct CorrectionParams {
  AttentionParams attention;  // as attention had them; `lse` is not null
  RowOperand q;
  RowOperand k, v;  // in the form that attention read them
  const SequenceRecord* sequences;
  int32_t num_sequences;
  int32_t num_read_heads;  // heads of k and v
  int32_t blocks_per_segment;
  int32_t total_key_blocks;
  int32_t permuted;  // keys and values are slots of whole blocks
  uint16_t* means;   // [num_read_heads, kMeanOperands, total_key_blocks, head_dim]
};

// The first mean of a head, counted in rows of `means`.
PBS_HOST_DEVICE constexpr int64_t FirstMean(const CorrectionParams& params,
                                            int read_head, MeanOperand operand) {
  return (int64_t{read_head} * kMeanOperands + static_cast<int>(operand)) *
         params.total_key_blocks;
}

// Fragments of 16 query rows of a warp, and query rows of a thread block. The sums of
// two fragments fit the registers up to head dim 128.
PBS_HOST_DEVICE constexpr int CorrectedFragments(int head_dim) {
  return head_dim <= 128 ? 2 : 1;
}
PBS_HOST_DEVICE constexpr int CorrectedRows(int head_dim) {
  return 4 * 16 * CorrectedFragments(head_dim);
}
// Bytes of shared memory of correct_by_means.h: queries, means of keys and of values,
// the tile, and a byte per key block. `longest` is the largest number of key blocks of
// a sequence.
PBS_HOST_DEVICE constexpr int64_t CorrectionSharedBytes(int head_dim, int longest) {
  constexpr int64_t kTileBytes = 128;  // of an AttentionTile, padded
  return int64_t{CorrectedRows(head_dim) + kMeanOperands * kMeansTogether} * head_dim *
             2 +
         kTileBytes + (longest + kMeansTogether - 1) / kMeansTogether * kMeansTogether;
}

}  // namespace pbs::cuda
