// Parameters of the kernels that order keys and select blocks, and the index arithmetic
// that the host's plan shares with them.
#pragma once

#include <cstdint>

#include "cuda/primitives/host_device.h"
#include "cuda/selection/key_line_params.h"
#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

constexpr int kBlockTokens = 128;  // tokens of a key or query block
// Proxies: the last queries of a sequence, which score its keys
constexpr int kProxies = 128;
constexpr int kScoredKeys = 64;     // keys of one scoring step
constexpr int kChunkBlocksMax = 8;  // key blocks that one thread block scores
// Query blocks whose lists one thread block makes, for short and for long prompts.
constexpr int kGroupBlocksMax = 8;
constexpr int kGroupBlocksMin = 4;
constexpr int kStridedRows = 128;  // of one thread block (select_antidiagonals.h)
constexpr int kAntidiagonalBlocksMax = 16;  // query blocks that these may hold

// One sequence of the batch. `..._begin` is the number of items in earlier sequences.
struct SequenceRecord {
  int64_t entries_begin;     // list entries, all heads
  int64_t entries_per_head;  // list entries per head of this sequence, worst case
  int32_t q_begin;
  int32_t q_len;
  int32_t k_begin;
  int32_t k_len;
  int32_t query_offset;
  int32_t key_block_begin;
  int32_t num_key_blocks;
  int32_t query_block_begin;
  int32_t num_query_blocks;
  int32_t first_query_block;  // absolute index
  int32_t chunk_begin;        // chunks of key blocks, each scored by one thread block
  int32_t segment_begin;      // sorted whole segments
  // Groups of query blocks, whose lists one thread block makes
  int32_t group_begin;
  int32_t scored_blocks;     // key blocks of whole segments; 0: order not computed
  int32_t sparse;            // 0: runs dense for any options
  int32_t tile_begin;        // tiles of attention, one head
  int32_t coverage_begin;    // groups of sampled rows (coverage_params.h)
  int32_t line_chunk_begin;  // chunks of key blocks, all of them (measure_lines.h)
  int32_t gathered_begin;    // blocks of gathered columns, one head
  int32_t gathered_blocks;
};

// A band of rotary pairs: pairs [begin, end). Pair p has the columns p and p + head_dim
// / 2.
struct PairBand {
  int32_t begin;
  int32_t end;
};
constexpr int kBands = 2;      // slow, fast
constexpr int kMeanParts = 2;  // of the mean of a key block (select_rows.h)

// Rounding of intermediate scores (pbs/attention.h, Scope::kQueryHead).
enum class ScoreRounding : int32_t { kNone, kInputDType };

// Kept are probabilities above `least`, and those equal to it before place `end`.
struct GridCut {
  int64_t end;     // in the grid of all heads
  uint32_t least;  // bits
  int32_t padding;
};

// The attention of the last queries by lines: columns are key slots, diagonals
// distances between query and key. Diagonal x is the distance k_len - 1 - x. Arrays by
// key block have those of all sequences side by side. minference chooses single lines
// (key_line_params.h), flexprefill blocks of them, by the fields from has_grid on.
struct LineParams {
  int32_t total_chunks;  // of chunk_blocks key blocks
  int32_t num_queries;   // at most kProxies; fewer where a sequence has fewer
  float scale_log2;      // converts logits to base two

  // [num_heads, total_key_blocks, 128] mean probability of each key slot and diagonal.
  float* columns;
  float* diagonals;
  float* rest;  // [num_heads, total_chunks, 128] of diagonals behind the chunk's keys

  int32_t has_grid;  // heads may select by block means
  float gamma;
  float tau;
  int32_t zero_is_far;  // as published, a block without mass makes the distance NaN
  // What a head keeps: [num_heads, 2, total_key_blocks] block columns and block
  // distances; [num_heads, num_sequences] whether it also keeps blocks of its grid.
  uint8_t* kept;
  int32_t* by_grid;
  // Probabilities of block means, by EntryOffset(), and which of them are kept:
  // [num_heads, num_sequences].
  float* grid;
  GridCut* cuts;
};

struct SelectionParams {
  const SequenceRecord* sequences;
  int32_t num_sequences;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t num_order_heads;  // num_kv_heads or num_heads
  int32_t head_dim;
  int32_t segment_size;
  int32_t blocks_per_segment;
  int32_t chunk_blocks;  // key blocks of a chunk
  int32_t group_blocks;  // query blocks of a group
  int32_t total_key_blocks;
  // Blocks of a head of the permuted copies: key blocks, then the gathered columns of
  // the query heads that read it
  int32_t copied_blocks;
  int32_t total_query_blocks;
  int32_t total_chunks;
  int32_t total_segments;
  int32_t total_groups;
  int32_t logit_stride;  // key blocks of the longest sequence, a multiple of 32

  float thresholds[kBands];  // the first, unless there are bands
  // Bands [0, bands_by_head) have the threshold of the head instead: [num_heads].
  float* head_thresholds;
  int32_t bands_by_head;
  PairBand bands[kBands];  // where blocks are scored by bands
  int32_t force_first_block;
  int32_t own_has_mass;  // identity order: blocks up to the diagonal share the mass
  float share_log2;      // log2 of the share of the largest score that keeps a block
  int32_t zero_rows;     // rows of zeros fill a short query block (select_rows.h)
  int32_t stride;        // tokens of a strided row (select_antidiagonals.h)
  int32_t lags;          // rows of the first chunk keep one block more, as published
  LineParams lines;      // flexprefill
  // Blocks that are read whatever their scores are (pbs/attention_options.h).
  int32_t dense_tail_blocks;
  int32_t sink_blocks;
  int32_t window_blocks;
  int32_t permutes;  // keys and values are copied; else they are read in place
  int32_t pools;     // block means of keys are computed
  // The sum of a short block of keys is divided by its length, not by that of a whole
  // block.
  int32_t pools_by_length;
  ScoreRounding key_rounding;    // of the scores of keys
  ScoreRounding block_rounding;  // of block means and of their scores

  RowOperand q, k, v;
  const int32_t* given_order;  // null: none
  RowStrides given_order_strides;

  // Scores. Chunks: [num_heads, total_chunks, kProxies] largest logit and sum, later
  // the same of lines.total_chunks. Proxies: [num_heads, num_sequences, kProxies] shift
  // and weight. Keys: [num_order_heads, total_key_blocks, 128] importance.
  float* chunk_max;
  float* chunk_sum;
  float* proxy_shift;
  float* proxy_weight;
  float* importance;

  // [num_order_heads, copied_blocks, 128] original position of each slot.
  int32_t* positions;
  uint16_t* permuted_k;  // [num_order_heads, copied_blocks, 128, head_dim]
  uint16_t* permuted_v;
  int32_t* first_block;   // [num_order_heads, num_sequences] slot block of key 0
  float* pooled_keys;     // [num_order_heads, head_dim, total_key_blocks]
  float* pooled_queries;  // [total_query_blocks, num_heads, head_dim], not rounded
  float* band_divisors;   // of logits: [num_heads, num_sequences, kBands]

  uint16_t* mean_rows;  // [num_order_heads, kMeanParts, total_key_blocks, head_dim]

  KeyLineParams key_lines;  // where columns and distances are chosen

  // Lists: counts [rows], entries at EntryOffset().
  uint16_t* counts;
  uint16_t* entries;
  int32_t* non_finite;  // set to 1 when a score is not finite
  int64_t* ordered;     // RunSummary::ordered, in the first kernel that selects
};

// Buffers for tiles of keys in scoring. With two, the next tile is loaded during the
// products; a head dim has two when three thread blocks still share a multiprocessor of
// Hopper.
PBS_HOST_DEVICE constexpr int KeyBuffers(int head_dim) {
  return head_dim <= 128 ? 2 : 1;
}
// Bytes of shared memory of scoring: queries, keys, their sums by warp, and importance
// for chunks of `chunk_blocks` key blocks (0: no importance).
PBS_HOST_DEVICE constexpr int64_t ScoreSharedBytes(int head_dim, int chunk_blocks) {
  return int64_t{kProxies + KeyBuffers(head_dim) * kScoredKeys} * head_dim * 2 +
         4 * kScoredKeys * 4 + chunk_blocks * kBlockTokens * 4;
}
// Bytes of shared memory of selection for a group of query blocks: logits, queries, and
// a bit per block with more than one band.
PBS_HOST_DEVICE constexpr int64_t SelectionSharedBytes(int group_blocks,
                                                       int logit_stride, int head_dim,
                                                       int num_bands) {
  const int marks = num_bands > 1 ? logit_stride / 32 : 0;
  return int64_t{group_blocks} * (logit_stride + head_dim + marks) * 4;
}
// Bytes of shared memory of select_rows.h: queries, means, their sums by warp, and the
// scores of a query block.
PBS_HOST_DEVICE constexpr int64_t RowsSharedBytes(int head_dim, int logit_stride) {
  return int64_t{kBlockTokens + KeyBuffers(head_dim) * kScoredKeys} * head_dim * 2 +
         2 * 4 * kScoredKeys * 4 + int64_t{logit_stride} * 4;
}
// Bytes of shared memory of select_antidiagonals.h for a group of query blocks: a token
// of each row and of each column, and masses.
PBS_HOST_DEVICE constexpr int64_t AntidiagonalSharedBytes(int head_dim,
                                                          int group_blocks,
                                                          int logit_stride) {
  return int64_t{kStridedRows + kScoredKeys} * head_dim * 2 +
         int64_t{group_blocks} * logit_stride * 4;
}
constexpr int kSharesPitch = kScoredKeys + 1;  // of a row of probabilities
// Bytes of shared memory of measure_lines.h: queries, and keys or their probabilities;
// diagonals of chunks of `chunk_blocks` key blocks.
PBS_HOST_DEVICE constexpr int64_t LinesSharedBytes(int head_dim, int chunk_blocks) {
  const int64_t keys = int64_t{kScoredKeys} * head_dim * 2;
  const int64_t shares = int64_t{kProxies} * kSharesPitch * 4;
  return int64_t{kProxies} * head_dim * 2 + (keys > shares ? keys : shares) +
         int64_t{chunk_blocks + 1} * kBlockTokens * 4;
}
// Bytes of shared memory of choose_lines.h: masses of block columns, of block distances
// and of the estimate; a mean query; sums by warp.
constexpr int kBlockValuesBytes = 2 * 16 * 3 * 8;
PBS_HOST_DEVICE constexpr int64_t ChooseLinesSharedBytes(int logit_stride,
                                                         int head_dim) {
  return kBlockValuesBytes + (int64_t{3} * logit_stride + head_dim) * 4;
}
// Bytes of shared memory of list_spans.h: a part of each key block for both groups.
PBS_HOST_DEVICE constexpr int64_t SpansSharedBytes(int logit_stride) {
  return int64_t{logit_stride} * 8;
}
// Query heads per KV head, and per order head.
PBS_HOST_DEVICE constexpr int GroupSize(const SelectionParams& params) {
  return params.num_heads / params.num_kv_heads;
}
PBS_HOST_DEVICE constexpr int Members(const SelectionParams& params) {
  return params.num_heads / params.num_order_heads;
}
// Chunks of all key blocks of a sequence whose lines are measured.
PBS_HOST_DEVICE constexpr int LineChunks(const SequenceRecord& s, int chunk_blocks) {
  return s.sparse != 0 ? (s.num_key_blocks + chunk_blocks - 1) / chunk_blocks : 0;
}
PBS_HOST_DEVICE constexpr int KvHeadOfOrder(const SelectionParams& params,
                                            int order_head) {
  return order_head * Members(params) / GroupSize(params);
}

// First block of the segment that holds block `block`.
PBS_HOST_DEVICE constexpr int OwnBegin(int block, int blocks_per_segment) {
  return block / blocks_per_segment * blocks_per_segment;
}
// One past the last block that query block `block` may read.
PBS_HOST_DEVICE constexpr int OwnEnd(int block, int blocks_per_segment,
                                     int num_key_blocks) {
  const int end = OwnBegin(block, blocks_per_segment) + blocks_per_segment;
  return end < num_key_blocks ? end : num_key_blocks;
}
// Entries of the lists of query blocks [0, block) of one head: the sum of their
// OwnEnd().
PBS_HOST_DEVICE constexpr int64_t EntriesBefore(int block, int blocks_per_segment,
                                                int num_key_blocks) {
  const int64_t per = blocks_per_segment;
  const int64_t segments = block / blocks_per_segment;
  const int64_t rest = block % blocks_per_segment;
  const int64_t end = (segments + 1) * per;
  return per * per * segments * (segments + 1) / 2 +
         rest * (end < num_key_blocks ? end : num_key_blocks);
}
// Offset of the list of (head, query block of the sequence). Entries for gathered
// blocks are before it.
PBS_HOST_DEVICE constexpr int64_t EntryOffset(const SequenceRecord& s, int head,
                                              int query_block, int blocks_per_segment) {
  return s.entries_begin + head * s.entries_per_head +
         EntriesBefore(s.first_query_block + query_block, blocks_per_segment,
                       s.num_key_blocks) -
         EntriesBefore(s.first_query_block, blocks_per_segment, s.num_key_blocks) +
         int64_t{query_block + 1} * s.gathered_blocks;
}
// Row of the lists, as AttentionGeometry::ListRow().
PBS_HOST_DEVICE constexpr int64_t ListRow(const SequenceRecord& s, int num_heads,
                                          int head, int query_block) {
  return int64_t{s.query_block_begin} * num_heads + int64_t{head} * s.num_query_blocks +
         query_block;
}

// First block of the gathered columns of a query head, in its head of the copies.
PBS_HOST_DEVICE constexpr int GatheredBlock(const SelectionParams& params,
                                            const SequenceRecord& s, int head) {
  return params.total_key_blocks +
         head % Members(params) * params.key_lines.total_gathered + s.gathered_begin;
}

}  // namespace pbs::cuda
