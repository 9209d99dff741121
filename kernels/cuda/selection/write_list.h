// Writes the list of one query block: the blocks that a rule keeps by their scores, and
// those that are read whatever their scores are (docs/KERNELS.md, section 3).
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

// A query block of one head.
struct ListPlace {
  int head;
  int sequence_index;
  int query_block;  // of the sequence
};

// Query block `query_block` of the sequence reads every earlier block.
PBS_DEVICE bool IsDenseTail(const SelectionParams& params,
                            const SequenceRecord& sequence, int query_block) {
  return sequence.num_query_blocks - query_block <= params.dense_tail_blocks;
}

// The first of the blocks that end with the query block's own and that it reads
// whatever their scores are.
PBS_DEVICE int WindowBegin(const SelectionParams& params,
                           const SequenceRecord& sequence, int query_block) {
  return IsDenseTail(params, sequence, query_block)
             ? 0
             : sequence.first_query_block + query_block + 1 - params.window_blocks;
}

// Blocks [0, count) may be kept by their scores, for a query block with this absolute
// index.
PBS_DEVICE int NumCandidates(const SelectionParams& params, int block) {
  return params.own_has_mass != 0 ? block + 1
                                  : OwnBegin(block, params.blocks_per_segment);
}

// Writes the list, ascending. One warp calls. keep(block, is_earlier) is called by all
// lanes for 32 neighbouring blocks at a time, in rising order; it is false for blocks
// that are not earlier than the own segment.
template <class Keep>
PBS_DEVICE void WriteList(const SelectionParams& params, const SequenceRecord& sequence,
                          const ListPlace& place, Keep&& keep) {
  const int lane = ThreadIndex() % 32;
  const uint32_t before = (1u << lane) - 1;
  const int own = sequence.first_query_block + place.query_block;
  const int own_begin = OwnBegin(own, params.blocks_per_segment);
  const int own_end = OwnEnd(own, params.blocks_per_segment, sequence.num_key_blocks);
  const int order_head = place.head / Members(params);
  const int forced =
      params.force_first_block != 0
          ? LoadGlobal(params.first_block + order_head * params.num_sequences +
                       place.sequence_index)
          : -1;
  const int window_begin = WindowBegin(params, sequence, place.query_block);
  uint16_t* list = params.entries + EntryOffset(sequence, place.head, place.query_block,
                                                params.blocks_per_segment);
  int count = 0;
  for (int first = 0; first < own_begin; first += 32) {
    const int block = first + lane;
    const bool is_earlier = block < own_begin;
    bool keeps = keep(block, is_earlier);
    keeps = keeps || (is_earlier && (block == forced || block < params.sink_blocks ||
                                     block >= window_begin));
    const uint32_t kept = Ballot(keeps);
    if (keeps) {
      StoreGlobal(list + count + PopulationCount(kept & before),
                  static_cast<uint16_t>(block));
    }
    count += PopulationCount(kept);
  }
  for (int block = own_begin + lane; block < own_end; block += 32) {
    StoreGlobal(list + count + block - own_begin, static_cast<uint16_t>(block));
  }
  if (lane == 0) {
    StoreGlobal(params.counts +
                    ListRow(sequence, params.num_heads, place.head, place.query_block),
                static_cast<uint16_t>(count + own_end - own_begin));
  }
}

}  // namespace pbs::cuda
