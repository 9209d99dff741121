// Diagonals over a whole sequence, from those of its chunks (measure_lines.h).
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

// First key slot and diagonal of a sequence, over all heads.
PBS_DEVICE int64_t FirstLine(const SelectionParams& params,
                             const SequenceRecord& sequence, int head) {
  return (int64_t{head} * params.total_key_blocks + sequence.key_block_begin) *
         kBlockTokens;
}

// What the tiles of a chunk add to diagonal `index` behind the chunk's keys.
PBS_DEVICE float RestOfChunk(const SelectionParams& params,
                             const SequenceRecord& sequence, int head, int chunk,
                             int index) {
  return LoadGlobal(
      params.lines.rest +
      (int64_t{head} * params.lines.total_chunks + sequence.line_chunk_begin + chunk) *
          kProxies +
      index);
}

// Mass of diagonal `x` >= 0, as two chunks of keys have it.
PBS_DEVICE float MassOfDiagonal(const SelectionParams& params,
                                const SequenceRecord& sequence, int head, int x) {
  const int keys = params.chunk_blocks * kBlockTokens;  // of a chunk
  float mass =
      LoadGlobal(params.lines.diagonals + FirstLine(params, sequence, head) + x);
  if (x >= keys && x % keys < kProxies) {
    mass += RestOfChunk(params, sequence, head, x / keys - 1, x % keys);
  }
  return mass;
}

}  // namespace pbs::cuda
