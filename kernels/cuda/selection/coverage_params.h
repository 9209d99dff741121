// Parameters of the kernel that measures coverage.
#pragma once

#include <cstdint>

#include "cuda/primitives/host_device.h"
#include "cuda/selection/selection_params.h"
#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

constexpr int kCoverageRowsTogether = 8;  // sampled rows of a thread block

struct CoverageParams {
  const SequenceRecord* sequences;
  int32_t num_sequences;
  int32_t num_heads;
  int32_t num_order_heads;
  int32_t num_read_heads;  // heads of k
  int32_t blocks_per_segment;
  int32_t rows;          // the most sampled rows of a sequence and head
  int32_t total_groups;  // groups of kCoverageRowsTogether rows, one head
  RowOperand q;
  RowOperand k;              // in the form that attention reads
  const int32_t* positions;  // as AttentionParams; null: keys are not permuted
  int64_t position_stride;
  float scale_log2;         // log2(e) / sqrt(head_dim)
  const uint16_t* counts;   // lengths of lists: [rows] by ListRow()
  const uint16_t* entries;  // entries of lists by EntryOffset()
  // Lists of parts of blocks, as KeyLineParams; null: blocks are read whole.
  const uint32_t* parts;
  const uint32_t* column_bits;
  const uint16_t* column_ends;
  int64_t column_stride;     // words of a head
  const int32_t* fell_back;  // [num_order_heads, num_sequences]; null: none can
  float* coverage;           // [num_heads, total_groups, kCoverageRowsTogether]
  int32_t is_measured;       // by the guard: only heads that fell back are new
};

struct GuardParams {
  CoverageParams coverage;
  float least;  // mean coverage below which a head is guarded
  // Lists as those of `coverage`, rewritten for guarded heads.
  uint16_t* counts;
  uint16_t* entries;
  int32_t* guarded;  // [num_heads, num_sequences], 1: it is
};

// Number of sampled rows of a sequence, at most `rows`.
PBS_HOST_DEVICE constexpr int SampledRows(int rows, int q_len) {
  return rows < q_len ? rows : q_len;
}
// As CoverageRow() (pbs/attention.h).
PBS_HOST_DEVICE constexpr int SampledRow(int i, int num_rows, int q_len) {
  return static_cast<int>((2 * int64_t{i} + 1) * q_len / (2 * int64_t{num_rows}));
}

}  // namespace pbs::cuda
