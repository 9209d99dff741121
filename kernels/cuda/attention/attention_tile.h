// The work of attention on a GPU, as the host plans it and kernels read it.
#pragma once

#include <cstdint>

namespace pbs::cuda {

constexpr int kTileRows = 128;  // query rows of a tile; keys of a block

// One tile of query rows of one head, and the key blocks that it reads.
struct AttentionTile {
  int64_t list_begin;   // first entry in AttentionParams::lists
  int32_t list_count;   // blocks to read, at least 1
  int32_t num_masked;   // the last of them, where positions are compared
  int32_t head;         // query head
  int32_t order_head;   // of the permuted keys and values
  int32_t first_query;  // row of q of the tile's row 0; may lie before the sequence
  int32_t begin_row;    // rows [begin_row, end_row) of the tile are the sequence's
  int32_t end_row;
  int32_t first_position;  // of row 0
  int32_t first_slot;      // row of the permuted keys of the sequence's block 0
};

// What both attention kernels take besides their operands.
struct AttentionParams {
  const AttentionTile* tiles;  // longest lists first
  int32_t num_tiles;
  int32_t* next_tile;        // zeroed before each run
  const uint16_t* lists;     // ascending; null: every block below list_count
  const int32_t* positions;  // [order heads, position_stride]; INT32_MAX in padding
  int64_t position_stride;
  float scale_log2;      // log2(e) / sqrt(head_dim)
  void* o;               // 16-bit elements
  int64_t o_row_stride;  // elements
  int64_t o_head_stride;
  float* lse;  // natural log; null when not wanted
  int64_t lse_head_stride;
  const int32_t* row_map;  // o and lse row of each query row; null: the same
};

}  // namespace pbs::cuda
