// The kernels of one run, in order, for a launcher of CUDA or of the emulator.
#pragma once

#include <algorithm>

#include "cuda/attention/correct_by_means.h"
#include "cuda/attention/pool_means.h"
#include "cuda/plan/cuda_plan.h"
#include "cuda/primitives/primitives.h"
#include "cuda/selection/choose_key_lines.h"
#include "cuda/selection/choose_lines.h"
#include "cuda/selection/gather_columns.h"
#include "cuda/selection/gather_keys.h"
#include "cuda/selection/guard_heads.h"
#include "cuda/selection/list_spans.h"
#include "cuda/selection/measure_bands.h"
#include "cuda/selection/measure_coverage.h"
#include "cuda/selection/measure_lines.h"
#include "cuda/selection/order_tiles.h"
#include "cuda/selection/score_keys.h"
#include "cuda/selection/select_antidiagonals.h"
#include "cuda/selection/select_blocks.h"
#include "cuda/selection/select_grid.h"
#include "cuda/selection/select_rows.h"
#include "cuda/selection/sort_segments.h"
#include "cuda/selection/store_sequences.h"
#include "cuda/selection/store_thresholds.h"

namespace pbs::cuda {

template <class Element, class Launcher>
void EnqueueSelectBlocks(const CudaAttentionPlan& plan, const SelectionParams& params,
                         Launcher& launch) {
  const auto enqueue = [&]<int kRows, int kNumBands>() {
    using Kernel = SelectBlocks<Element, kRows, kNumBands>;
    launch.template Run<Kernel>(
        int64_t{params.num_heads} * params.total_groups,
        SelectionSharedBytes(kRows, params.logit_stride, params.head_dim, kNumBands),
        params);
  };
  const bool many = plan.group_blocks == kGroupBlocksMax;
  if (plan.scorer == Scorer::kBands) {
    many ? enqueue.template operator()<kGroupBlocksMax, kBands>()
         : enqueue.template operator()<kGroupBlocksMin, kBands>();
  } else {
    many ? enqueue.template operator()<kGroupBlocksMax, 1>()
         : enqueue.template operator()<kGroupBlocksMin, 1>();
  }
}

// Enqueues the kernels that sum the last queries' attention by columns and diagonals.
template <class Element, int kHeadDim, class Launcher>
void EnqueueMeasureLines(const SelectionParams& params, Launcher& launch) {
  const int64_t heads = params.num_heads;
  const int64_t chunks = heads * params.lines.total_chunks;
  const int64_t bytes = LinesSharedBytes(kHeadDim, params.chunk_blocks);
  launch.template Run<SumLines<Element, kHeadDim>>(chunks, bytes, params);
  launch.template Run<WeighLines>(heads * params.num_sequences * WeighProxies::kParts,
                                  WeighProxies::kSharedBytes, params);
  launch.template Run<ShareLines<Element, kHeadDim>>(chunks, bytes, params);
}

template <class Element, int kHeadDim, class Launcher>
void EnqueueSelectLines(const CudaAttentionPlan& plan, const SelectionParams& params,
                        Launcher& launch) {
  const int64_t heads = params.num_heads;
  EnqueueMeasureLines<Element, kHeadDim>(params, launch);
  launch.template Run<ChooseLines<Element>>(
      heads * params.num_sequences,
      ChooseLinesSharedBytes(params.logit_stride, params.head_dim), params);
  if (plan.has_grid()) {
    const auto score = [&]<int kRows>() {
      launch.template Run<ScoreGrid<Element, kRows>>(
          heads * params.total_groups,
          SelectionSharedBytes(kRows, params.logit_stride, params.head_dim, 1), params);
    };
    plan.group_blocks == kGroupBlocksMax ? score.template operator()<kGroupBlocksMax>()
                                         : score.template operator()<kGroupBlocksMin>();
    launch.template Run<CutGrid>(heads * params.num_sequences, CutGrid::kSharedBytes,
                                 params);
  }
  launch.template Run<WriteLines>(heads * params.total_groups, 0, params);
}

template <class Launcher>
void EnqueueSortSegments(const SelectionParams& params, Launcher& launch) {
  const int64_t segments = int64_t{params.num_order_heads} * params.total_segments;
  const int keys = SortedKeys(params.segment_size);
  const int64_t bytes = int64_t{keys} * kBytesPerSortedKey;
  if (keys <= kFewSortedKeys) {
    launch.template Run<SortSegments<128>>(segments, bytes, params);
  } else {
    launch.template Run<SortSegments<512>>(segments, bytes, params);
  }
}

template <class Launcher>
void EnqueueStoreSequences(const CudaAttentionPlan& plan, const RunParams& run,
                           Launcher& launch) {
  const SelectionParams& params = run.selection;
  StoredSequences stored{};
  stored.target = const_cast<SequenceRecord*>(params.sequences);
  stored.summary = run.summary;
  stored.heads = run.tile_order.heads;
  stored.num_heads = stored.heads == nullptr ? 0 : params.num_heads;
  for (int32_t first = 0; first < params.num_sequences; first += kSequencesPerStore) {
    stored.first = first;
    stored.count = std::min(kSequencesPerStore, params.num_sequences - first);
    std::copy_n(plan.sequences.begin() + first, stored.count, stored.records);
    launch.template Run<StoreSequences>(1, 0, stored);
    stored.summary = nullptr;
  }
}

template <class Launcher>
void EnqueueStoreThresholds(const RunParams& run, Launcher& launch) {
  const auto total = static_cast<int32_t>(run.head_thresholds.size());
  for (int32_t first = 0; first < total; first += kThresholdsPerStore) {
    StoredThresholds stored{};
    stored.target = run.selection.head_thresholds + first;
    stored.count = std::min(kThresholdsPerStore, total - first);
    std::copy_n(run.head_thresholds.begin() + first, stored.count, stored.values);
    launch.template Run<StoreThresholds>(1, 0, stored);
  }
}

template <class Launcher>
void EnqueueOrderTiles(const TileOrderParams& tiles, Launcher& launch) {
  const int64_t sections = int64_t{tiles.num_order_heads} * tiles.num_sequences;
  launch.template Run<OrderTiles>(tiles.one_section != 0 ? 1 : sections,
                                  OrderTiles::SharedBytes(tiles), tiles);
}

// Enqueues the kernels that order and move keys. `launch` has
//   template <class Kernel, class Params>
//   void Run(int64_t blocks, int64_t shared_bytes, const Params& params);
// A launch of no blocks must do nothing.
template <class Element, int kHeadDim, class Launcher>
void EnqueueOrder(const CudaAttentionPlan& plan, const RunParams& run,
                  Launcher& launch) {
  const SelectionParams& params = run.selection;
  const int64_t heads = params.num_heads;
  const int64_t order_heads = params.num_order_heads;
  EnqueueStoreSequences(plan, run, launch);
  EnqueueStoreThresholds(run, launch);
  if (plan.orders) {
    launch.template Run<SumChunks<Element, kHeadDim>>(
        heads * params.total_chunks, ScoreSharedBytes(kHeadDim, 0), params);
    launch.template Run<WeighProxies>(
        heads * params.num_sequences * WeighProxies::kParts, WeighProxies::kSharedBytes,
        params);
    launch.template Run<ShareImportance<Element, kHeadDim>>(
        order_heads * params.total_chunks,
        ScoreSharedBytes(kHeadDim, params.chunk_blocks), params);
    EnqueueSortSegments(params, launch);
  }
  if (plan.permutes || plan.selects) {
    launch.template Run<GatherKeys<Element, kHeadDim>>(
        order_heads * params.total_key_blocks,
        BlockRows<Element, kHeadDim>::kSharedBytes + kBlockTokens * 4, params);
  }
}

// Enqueues the kernels that choose columns and distances, gather the columns and make
// lists.
template <class Element, int kHeadDim, class Launcher>
void EnqueueKeyLines(const SelectionParams& params, Launcher& launch) {
  const int64_t heads = params.num_heads;
  EnqueueMeasureLines<Element, kHeadDim>(params, launch);
  launch.template Run<ChooseKeyLines>(2 * heads * params.num_sequences,
                                      ChooseKeyLines::kSharedBytes, params);
  using Gather = GatherColumns<Element, kHeadDim>;
  launch.template Run<Gather>(heads * params.key_lines.total_gathered,
                              Gather::kSharedBytes, params);
  launch.template Run<ListSpans>(heads * params.total_query_blocks,
                                 SpansSharedBytes(params.logit_stride), params);
}

// Enqueues the kernels that score blocks and make lists.
template <class Element, int kHeadDim, class Launcher>
void EnqueueSelection(const CudaAttentionPlan& plan, const SelectionParams& params,
                      Launcher& launch) {
  const int64_t heads = params.num_heads;
  if (plan.chooses_key_lines) {
    EnqueueKeyLines<Element, kHeadDim>(params, launch);
  } else if (plan.scorer == Scorer::kRows) {
    launch.template Run<SplitMeans<Element>>(
        int64_t{params.num_order_heads} * params.total_key_blocks, 0, params);
    launch.template Run<SelectRows<Element, kHeadDim>>(
        heads * params.total_query_blocks,
        RowsSharedBytes(kHeadDim, params.logit_stride), params);
  } else if (plan.scorer == Scorer::kAntidiagonal) {
    launch.template Run<SelectAntidiagonals<Element, kHeadDim>>(
        heads * params.total_groups,
        AntidiagonalSharedBytes(kHeadDim, params.group_blocks, params.logit_stride),
        params);
  } else if (plan.chooses_block_lines()) {
    EnqueueSelectLines<Element, kHeadDim>(plan, params, launch);
  } else {
    EnqueueSelectBlocks<Element>(plan, params, launch);
  }
}

// Enqueues the kernel that measures coverage: RunParams::coverage after attention.
template <class Element, int kHeadDim, class Launcher>
void EnqueueCoverage(const CudaAttentionPlan& plan, const CoverageParams& params,
                     Launcher& launch) {
  using Kernel = MeasureCoverage<Element, kHeadDim>;
  launch.template Run<Kernel>(int64_t{params.num_heads} * params.total_groups,
                              Kernel::SharedBytes(plan.longest_list), params);
}

// Enqueues the kernels that make lists and tiles. Call it after EnqueueOrder().
template <class Element, int kHeadDim, class Launcher>
void EnqueueLists(const CudaAttentionPlan& plan, const RunParams& run,
                  Launcher& launch) {
  SelectionParams params = run.selection;
  if (plan.pools_queries) {
    const int64_t heads = params.num_heads;
    launch.template Run<PoolQueries<Element, kHeadDim>>(
        heads * params.total_query_blocks, BlockRows<Element, kHeadDim>::kSharedBytes,
        params);
    params.ordered = nullptr;  // stamped
  }
  if (plan.scorer == Scorer::kBands) {
    launch.template Run<MeasureBands>(int64_t{params.num_heads} * params.num_sequences,
                                      MeasureBands::kSharedBytes, params);
    params.ordered = nullptr;
  }
  if (plan.selects) EnqueueSelection<Element, kHeadDim>(plan, params, launch);
  if (plan.guards()) {
    EnqueueCoverage<Element, kHeadDim>(plan, run.guard.coverage, launch);
    launch.template Run<GuardHeads>(int64_t{params.num_heads} * params.num_sequences,
                                    GuardHeads::kSharedBytes, run.guard);
  }
  EnqueueOrderTiles(run.tile_order, launch);
}

// Enqueues the kernels that correct the outputs by the means of blocks that are not
// listed. Call it after attention.
template <class Element, int kHeadDim, class Launcher>
void EnqueueCorrection(const CudaAttentionPlan& plan, const RunParams& run,
                       Launcher& launch) {
  if (!plan.corrects) return;
  const CorrectionParams& params = run.correction;
  launch.template Run<PoolMeans<Element, kHeadDim>>(
      int64_t{params.num_read_heads} * kMeanOperands * params.total_key_blocks,
      BlockRows<Element, kHeadDim>::kSharedBytes, params);
  using Kernel = CorrectByMeans<Element, kHeadDim>;
  launch.template Run<Kernel>(int64_t{run.attention.num_tiles} * Kernel::kParts,
                              CorrectionSharedBytes(kHeadDim, plan.longest_list),
                              params);
}

}  // namespace pbs::cuda
