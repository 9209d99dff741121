// Means of key and value blocks, for the mean correction.
#pragma once

#include "cuda/attention/correction_params.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/block_rows.h"
#include "cuda/selection/sequences.h"

namespace pbs::cuda {

// Writes the means of the blocks, rounded to elements. Grid [num_read_heads,
// kMeanOperands, total_key_blocks], 128 threads; dynamic shared memory as BlockRows.
// The sum of a short block is divided by the size of a whole one, which nothing reads:
// no query comes after all keys of a short block.
template <class Element, int kHeadDim>
struct PoolMeans {
  static constexpr int kThreads = 128;
  using Rows = BlockRows<Element, kHeadDim>;

  PBS_DEVICE static void Run(const CorrectionParams& params) {
    const GridPlace place = PlaceInGrid(params.total_key_blocks);
    const int head = place.head / kMeanOperands;
    const auto operand = static_cast<MeanOperand>(place.head % kMeanOperands);
    const int index = FindSequence<&SequenceRecord::key_block_begin>(
        params.sequences, params.num_sequences, place.item);
    const SequenceRecord s = LoadGlobal(params.sequences + index);
    const RowOperand& rows_of = operand == MeanOperand::kKeys ? params.k : params.v;
    const int before =
        params.permuted != 0 ? s.key_block_begin * kBlockTokens : s.k_begin;
    const int first = (place.item - s.key_block_begin) * kBlockTokens;
    const uint16_t* source =
        rows_of.data + rows_of.strides.Offset(index, before, head, first);
    Rows rows;
    Rows::ForEachPiece(
        [&](int row) -> const uint16_t* {
          return first + row < s.k_len ? source + row * rows_of.strides.row : nullptr;
        },
        [&](int, int group, int, const Words4& values) { rows.Add(group, values); });
    uint16_t* target =
        params.means + (FirstMean(params, head, operand) + place.item) * kHeadDim;
    rows.Mean(ScoreRounding::kNone, [&](int column, float mean) {
      StoreGlobal(target + column, static_cast<uint16_t>(Element::Pack(mean, 0.0f)));
    });
  }
};

}  // namespace pbs::cuda
