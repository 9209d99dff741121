// Gathers the keys and values of chosen columns behind the copied blocks of their head
// (minference).
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/block_rows.h"
#include "cuda/selection/sequences.h"

namespace pbs::cuda {

// Grid [num_heads, total_gathered], 128 threads. Columns keep their positions.
template <class Element, int kHeadDim>
class GatherColumns {
 public:
  static constexpr int kThreads = 128;
  using Rows = BlockRows<Element, kHeadDim>;
  static constexpr int kSharedBytes = kBlockTokens * 4;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const GridPlace place = PlaceInGrid(params.key_lines.total_gathered);
    const SequenceRecord s = LoadGlobal(
        params.sequences + FindSequence<&SequenceRecord::gathered_begin>(
                               params.sequences, params.num_sequences, place.item));
    auto* slots = reinterpret_cast<int32_t*>(SharedMemory());
    const int64_t first_of_head =
        int64_t{place.head / Members(params)} * params.copied_blocks;
    const int64_t source = (first_of_head + s.key_block_begin) * kBlockTokens;
    const int block = place.item - s.gathered_begin;
    const int64_t target =
        (first_of_head + GatheredBlock(params, s, place.head) + block) * kBlockTokens;
    const int column = block * kBlockTokens + ThreadIndex();
    int slot = -1;
    int position = INT32_MAX;
    if (column < NumColumns(params.key_lines.vertical_tokens, s.k_len)) {
      slot = LoadGlobal(params.key_lines.chosen + int64_t{BlockIndex()} * kBlockTokens +
                        ThreadIndex());
      position = LoadGlobal(params.positions + source + slot);
    }
    StoreGlobal(params.positions + target + ThreadIndex(), position);
    StoreShared(slots + ThreadIndex(), slot);
    SyncThreads();
    Copy(slots, params.permuted_k, source, target);
    Copy(slots, params.permuted_v, source, target);
  }

 private:
  PBS_DEVICE static void Copy(const int32_t* slots, uint16_t* rows, int64_t source,
                              int64_t target) {
    Rows::ForEachPiece(
        [&](int row) -> const uint16_t* {
          const int32_t slot = LoadShared(slots + row);
          return slot < 0 ? nullptr : rows + (source + slot) * kHeadDim;
        },
        [&](int row, int, int piece, const Words4& values) {
          StoreGlobal(
              reinterpret_cast<Words4*>(rows + (target + row) * kHeadDim + piece * 8),
              values);
        });
  }
};

}  // namespace pbs::cuda
