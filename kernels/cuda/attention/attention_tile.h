// Tiles and parameters of attention on a GPU.
#pragma once

#include <cstdint>

#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

constexpr int kTileRows = 128;  // query rows of a tile that has its own list
// Query rows of a tile that reads every block (Sm90Options).
constexpr int kWideTileRows = 192;
constexpr int kBlockKeys = 128;  // keys of a block
// Neighbouring query positions that read the same keys, where parts of blocks are read.
constexpr int kRowGroup = 64;
constexpr int kGroupsOfTile = kTileRows / kRowGroup;

// One tile of query rows of one head, and the key blocks that it reads. It is copied as
// a whole, so its size is a multiple of 16.
struct alignas(16) AttentionTile {
  int64_t list_begin;   // first entry in AttentionParams::lists; below 0: none,
                        // every block below list_count
  int32_t list_count;   // blocks to read, at least 1; 0 after the last tile
  int32_t num_masked;   // the last of them, where positions are compared
  int32_t last_block;   // the last of them, which is read first
  int32_t sequence;     // index in the batch
  int32_t head;         // query head
  int32_t order_head;   // order head of the keys and values
  int32_t q_begin;      // queries of earlier sequences
  int32_t first_query;  // query of the sequence at the tile's row 0; may be negative
  int32_t begin_row;    // rows [begin_row, end_row) of the tile belong to the sequence
  int32_t end_row;
  int32_t first_position;  // position of row 0
  int32_t first_slot;      // keys (slots, if they are permuted) of earlier sequences
  int32_t num_keys;        // keys of the sequence
};
static_assert(sizeof(AttentionTile) == 64);

// Parameters of both attention kernels besides their operands.
struct AttentionParams {
  const AttentionTile* tiles;  // [num_tiles + 1], longest lists first
  int32_t num_tiles;
  int32_t* next_tile;        // zeroed before each run
  const uint16_t* lists;     // ascending
  const int32_t* positions;  // [order heads, position_stride], by slot, INT32_MAX in
                             // padding; null: keys are not permuted
  int64_t position_stride;   // a multiple of kBlockKeys
  // Where tiles read parts of blocks; null: they read whole blocks. [list entries, 2
  // groups of 64 rows], and the chosen columns of the query heads, [heads,
  // column_stride] bits of slots in words (tiles/block_part.h).
  const uint32_t* parts;
  const uint32_t* column_bits;
  int64_t column_stride;
  float scale_log2;  // log2(e) / sqrt(head_dim)
  void* o;           // 16-bit elements
  RowStrides o_strides;
  float* lse;  // natural log; null when not requested
  RowStrides lse_strides;
};

}  // namespace pbs::cuda
