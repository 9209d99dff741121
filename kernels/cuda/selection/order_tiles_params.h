// Parameters of the kernel that orders attention's tiles.
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
  int32_t num_read_heads;  // heads of the keys and values that attention reads: order
                           // heads if they are permuted, else KV heads
  int32_t blocks_per_segment;
  int32_t total_tiles;  // rows of the lists, where there are lists
  int32_t tile_rows;    // queries of a tile; kTileRows where there are lists
  // 1: all tiles in one section; else one per sequence and order head
  int32_t one_section;
  int32_t longest;         // the most blocks of a list
  int32_t dense_fallback;  // order heads may fall back to dense
  float fallback_ratio;    // share of the causal blocks from which on they do
  const uint16_t* counts;  // [tiles] by ListRow(); null: every list has all blocks
  uint16_t* entries;       // by EntryOffset()
  // The caller's lists, which are copied to `entries`; null: none.
  const int64_t* given_begin;  // [tiles]
  const uint16_t* given_entries;
  // Lists of parts of blocks: how many gathered blocks are before each list, [tiles];
  // null: none.
  const uint16_t* gathered;
  int32_t permuted;      // blocks of the own segment hold keys of the whole segment
  AttentionTile* tiles;  // [total_tiles], and one tile without blocks
  int32_t* next_tile;
  int32_t* fell_back;  // [num_order_heads, num_sequences] 1: lists were not read
  BlockCounts* heads;  // [num_heads] increased; null: nothing is counted
  int64_t* ordered;    // RunSummary::ordered; null: an earlier kernel has written it
  int64_t* listed;     // RunSummary::listed
};

}  // namespace pbs::cuda
