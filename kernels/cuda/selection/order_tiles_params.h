// What the kernel that orders attention's tiles reads and writes.
#pragma once

#include <cstdint>

#include "common/block_counts.h"
#include "cuda/attention/attention_tile.h"
#include "cuda/selection/selection_params.h"

namespace pbs::cuda {

struct TileOrderParams {
  const SequenceRecord* sequences;
  int32_t num_sequences;
  int32_t num_heads;
  int32_t num_order_heads;
  int32_t num_read_heads;  // of the keys and values that attention reads: those with an
                           // order if they are permuted, else the KV heads
  int32_t blocks_per_segment;
  int32_t total_tiles;     // rows of the lists, where there are lists
  int32_t tile_rows;       // queries of a tile; kTileRows where there are lists
  int32_t one_section;     // all tiles in one; else one per sequence and order head
  int32_t longest;         // most blocks that a list can have
  int32_t dense_fallback;  // lists of little use are not read
  float fallback_ratio;    // of causal blocks from which on they are not
  const uint16_t* counts;  // [tiles] by ListRow(); null: every list is arithmetic
  uint16_t* entries;       // by EntryOffset()
  // Lists of the caller, which are copied to `entries`; null: none.
  const int64_t* given_begin;  // [tiles]
  const uint16_t* given_entries;
  int32_t permuted;      // own blocks hold keys of the whole segment
  AttentionTile* tiles;  // [total_tiles], and one of no blocks
  int32_t* next_tile;
  int32_t* fell_back;  // [num_order_heads, num_sequences] 1: lists were not read
  BlockCounts* heads;  // [num_heads] added to; null: nothing is counted
  int64_t* ordered;    // RunSummary::ordered; null: an earlier kernel stamped it
  int64_t* listed;     // RunSummary::listed
};

}  // namespace pbs::cuda
