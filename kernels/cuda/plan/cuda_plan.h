// The CUDA backend's attention plan: the kernels that run, their sizes, and the layout
// of the workspace. Host code without CUDA, so that it is built and tested everywhere.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "cuda/attention/attention_tile.h"
#include "cuda/attention/correction_params.h"
#include "cuda/selection/coverage_params.h"
#include "cuda/selection/order_tiles_params.h"
#include "cuda/selection/run_summary.h"
#include "cuda/selection/selection_params.h"
#include "pbs/attention.h"
#include "pbs/workspace.h"

namespace pbs::cuda {

inline constexpr std::array<int32_t, 4> kCudaHeadDims = {64, 96, 128, 256};

// Facts about the plan's device, and choices for it.
struct DeviceTraits {
  int32_t num_multiprocessors = 132;
  int64_t shared_bytes_max = 227 << 10;  // per thread block
  bool one_section = false;              // all tiles in one section
  // Wide tiles where every block is read, head dim 64 (sm90_config.h)
  bool wide_tiles = false;
};

// Offsets of the arrays of KeyLineParams in bytes.
struct KeyLineRegions {
  int64_t distances = 0;
  int64_t chosen = 0;
  int64_t column_bits = 0;
  int64_t distance_bits = 0;
  int64_t bits_bytes = 0;  // of each of them
  int64_t parts = 0;
  int64_t gathered = 0;
  int64_t column_ends = 0;
};

struct CudaAttentionPlan final : AttentionPlan {
  std::vector<SequenceRecord> sequences;

  // Stages that run besides attention itself.
  bool orders = false;            // keys are scored and sorted
  bool permutes = false;          // keys and values are copied
  bool selects = false;           // blocks are scored, lists are made
  Scorer scorer = Scorer::kNone;  // with selects
  // Columns and distances are chosen (key_line_params.h). The copies then have the
  // gathered columns, too.
  bool chooses_key_lines = false;
  // The run pools query blocks for it; else pooled queries are given.
  bool pools_queries = false;
  bool has_lists = false;
  bool corrects = false;  // blocks that are not listed take part as means

  int32_t chunk_blocks = 1;
  int32_t group_blocks = kGroupBlocksMax;
  int32_t logit_stride = 32;
  int32_t total_key_blocks = 0;
  int32_t copied_blocks = 0;   // of a head of the copies
  int32_t total_gathered = 0;  // blocks of gathered columns, one query head
  int32_t most_gathered = 0;   // of a sequence
  int32_t total_query_blocks = 0;
  int32_t total_chunks = 0;
  int32_t total_segments = 0;
  int32_t total_groups = 0;
  int32_t total_line_chunks = 0;  // of all key blocks (measure_lines.h)
  int32_t coverage_groups = 0;    // groups of sampled rows; 0: coverage is not measured
  int32_t longest_list = 0;
  bool one_section = false;  // all tiles in one section (order_tiles.h)
  int32_t tile_rows = kTileRows;
  int32_t tiles_per_head = 0;

  // Workspace offsets in bytes.
  int64_t sequences_at = 0;
  int64_t next_tile_at = 0;
  // RunSummary and the arrays after it: all data of a report without order and lists.
  int64_t summary_at = 0;
  int64_t summary_bytes = 0;
  int64_t head_blocks_at = 0;  // with has_lists
  int64_t fell_back_at = 0;    // with may_fall_back()
  int64_t coverage_at = 0;     // with coverage_groups
  int64_t guarded_at = 0;      // with guards()
  int64_t chunk_max_at = 0;
  int64_t chunk_sum_at = 0;
  int64_t proxy_shift_at = 0;
  int64_t proxy_weight_at = 0;
  int64_t importance_at = 0;
  int64_t positions_at = 0;
  int64_t permuted_k_at = 0;
  int64_t permuted_v_at = 0;
  int64_t first_block_at = 0;
  int64_t pooled_keys_at = 0;
  int64_t pooled_queries_at = 0;
  int64_t band_divisors_at = 0;
  int64_t mean_rows_at = 0;
  int64_t head_thresholds_at = 0;  // with thresholds_by_head()
  int64_t columns_at = 0;
  int64_t diagonals_at = 0;
  int64_t rest_at = 0;
  int64_t kept_lines_at = 0;
  int64_t by_grid_at = 0;
  int64_t grid_at = 0;
  int64_t grid_cuts_at = 0;
  int64_t counts_at = 0;
  int64_t entries_at = 0;
  int64_t total_entries = 0;    // with those of gathered blocks
  KeyLineRegions key_lines_at;  // with chooses_key_lines
  int64_t tiles_at = 0;
  int64_t means_at = 0;  // with corrects
  int64_t lse_at = 0;    // with corrects: for callers who do not want it

  // Query blocks are scored by their means.
  bool needs_pooled_queries() const {
    return selects &&
           (scorer == Scorer::kMeans || scorer == Scorer::kBands || has_grid());
  }
  // Heads may keep the largest probabilities of block means (select_grid.h). No
  // distance is below 0.
  bool has_grid() const {
    return chooses_block_lines() && problem.options.tau > 0 &&
           !SelectsEveryBlock(problem.options);
  }
  // The last queries' attention is summed by columns and diagonals (measure_lines.h).
  bool measures_lines() const { return scorer == Scorer::kLines; }
  // Block columns and block distances are chosen (choose_lines.h).
  bool chooses_block_lines() const { return measures_lines() && !chooses_key_lines; }
  // Means of key blocks are computed.
  bool pools_keys() const { return selects && !chooses_key_lines; }
  int num_bands() const { return scorer == Scorer::kBands ? kBands : 1; }
  bool may_fall_back() const { return problem.options.dense_fallback && selects; }
  bool thresholds_by_head() const { return problem.has_head_thresholds && selects; }
  bool guards() const { return problem.options.coverage_min > 0 && selects; }
  int64_t num_tiles() const { return int64_t{tiles_per_head} * geometry.num_heads; }
};

// InvalidArgument as ValidateProblem(); Unimplemented names field, value and what the
// CUDA backend supports.
StatusOr<std::unique_ptr<CudaAttentionPlan>> MakeCudaPlan(
    const AttentionProblem& problem, const DeviceTraits& device);

// Parameters of the kernels of one run. InvalidArgument when an operand is not 16-byte
// aligned, when a stride is no multiple of eight elements, or when a stride between
// several rows, heads or sequences is not positive; as ValidateHeadThresholds().
struct RunParams {
  SelectionParams selection;
  TileOrderParams tile_order;
  CoverageParams coverage;
  GuardParams guard;
  CorrectionParams correction;
  AttentionParams attention;
  RowOperand q, k, v;  // operands of attention
  // On the host, of the tensors; empty: none.
  std::span<const float> head_thresholds;
  RunSummary* summary;
};
StatusOr<RunParams> MakeRunParams(const CudaAttentionPlan& plan,
                                  const AttentionTensors& tensors, Workspace workspace);

}  // namespace pbs::cuda
