// The sequence of the batch that a thread block works on.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

// Place of a thread block in a grid [heads, items], with the items of all sequences
// side by side.
struct GridPlace {
  int item;
  int head;
};
PBS_DEVICE GridPlace PlaceInGrid(int items) {
  return {BlockIndex() % items, BlockIndex() / items};
}

// The sequence that holds item `index`; `kBegin` counts the items of earlier ones.
template <int32_t SequenceRecord::*kBegin>
PBS_DEVICE int FindSequence(const SequenceRecord* sequences, int count, int index) {
  int low = 0;
  int high = count;  // the first sequence that begins after the item
  while (low < high) {
    const int middle = (low + high) / 2;
    if (LoadGlobal(&(sequences[middle].*kBegin)) <= index) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

}  // namespace pbs::cuda
