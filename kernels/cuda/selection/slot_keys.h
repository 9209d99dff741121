// The keys of one head and sequence in the order of their slots: permuted copies, or
// the caller's keys in place.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

struct SlotKeys {
  const uint16_t* first;  // of slot 0
  int64_t stride;         // elements between slots
};

PBS_DEVICE SlotKeys SlotKeysOf(const SelectionParams& params,
                               const SequenceRecord& sequence, int sequence_index,
                               int order_head) {
  if (params.permutes == 0) {
    return {
        params.k.data + params.k.strides.Offset(sequence_index, sequence.k_begin,
                                                KvHeadOfOrder(params, order_head), 0),
        params.k.strides.row};
  }
  const int64_t slot =
      (int64_t{order_head} * params.copied_blocks + sequence.key_block_begin) *
      kBlockTokens;
  return {params.permuted_k + slot * params.head_dim, params.head_dim};
}

}  // namespace pbs::cuda
