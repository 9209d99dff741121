// Scores blocks by the sums over the query rows of exp(logit of the row with the
// block's mean key), and keeps those of at least a share of the largest (flashprefill,
// arXiv 2603.06199).
//
// Only rows that see the whole block count: all rows for earlier blocks, the last row
// for the diagonal block.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/attention_select.h"
#include "methods/block_selection.h"

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int32_t kChunkPanels = 8;  // panels of block means scored together

// Logits of a block's visible rows, in units of log2: the largest, and the sum of
// 2^(logit - largest).
struct BlockEnergy {
  float* top;  // [padded blocks]
  float* sum;  // [padded blocks]
};

// Energies of the blocks [0, count) of all rows [rows, head_dim] of a query block. Also
// gives the last row's logit with block `count`, in units of log2.
float Measure(const AttentionRun& run, const Unit& unit, const float* rows,
              int32_t num_rows, int32_t count, float* scores,
              const BlockEnergy& energy) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t head_dim = plan.geometry.head_dim;
  const float root = std::sqrt(static_cast<float>(head_dim));
  const float* keys = run.Pooled(unit) + plan.Pooled(s).keys;
  const int32_t chunk = kChunkPanels * run.kernels.panel_width;
  float last = 0;
  for (int32_t first = 0; first <= count && first < PaddedBlocks(s); first += chunk) {
    const int32_t cols = std::min(chunk, PaddedBlocks(s) - first);
    run.kernels.gemm(
        {.rows = num_rows,
         .cols = cols,
         .depth = head_dim,
         .a = reinterpret_cast<const uint32_t*>(rows),
         .a_stride = head_dim,
         .b = reinterpret_cast<const uint32_t*>(keys + int64_t{first} * head_dim),
         .c = scores,
         .c_stride = cols});
    if (count - first < cols) {
      last = scores[int64_t{num_rows - 1} * cols + count - first] * (kLog2E / root);
    }
    run.kernels.proxy_softmax({.keys = num_rows,
                               .proxies = cols,
                               .scale = kLog2E / root,
                               .rounding = ProxyRounding::kNone,
                               .sqrt_head_dim = root,
                               .scores = scores,
                               .tile_max = energy.top + first,
                               .tile_sum = energy.sum + first});
  }
  return last;
}

// The largest logit of the blocks [0, count); NaN when one is not finite.
float LargestLogit(const BlockEnergy& energy, int32_t count) {
  float top = -INFINITY;
  for (int32_t j = 0; j < count; ++j) {
    if (!std::isfinite(energy.top[j])) return NAN;
    top = std::max(top, energy.top[j]);
  }
  return top;
}

}  // namespace

int64_t RowsWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t padded = PaddedBlocks(s);
  const int64_t cols = std::min<int64_t>(kChunkPanels * kPanelWidthMax, padded);
  return int64_t{g.block_size} * (g.head_dim + cols) + 2 * padded +
         RoundUp(s.num_key_blocks / 4 + 1, kLanePad);
}

void SelectByRows(AttentionRun& run, const Unit& unit, const SelectItem& item,
                  int worker) {
  const AttentionGeometry& g = run.plan.geometry;
  const AttentionOptions& options = run.plan.problem.options;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t padded = PaddedBlocks(s);
  ItemScratch scratch(run, worker);
  float* rows = scratch.Floats(int64_t{g.block_size} * g.head_dim);
  const BlockEnergy energy = {scratch.Floats(padded), scratch.Floats(padded)};
  const std::span<uint8_t> keep = scratch.Keep(s.num_key_blocks);
  float* scores = scratch.Floats(0);
  std::fill(keep.begin(), keep.end(), uint8_t{0});

  const int32_t query_block = item.first_block;
  const int32_t block = s.first_query_block + query_block;
  const RowRange range = RowsOfBlock(run, unit, query_block);
  const int32_t candidates = NumCandidates(run, unit, query_block);
  if (!IsDenseTail(run, unit, item.member, query_block) && candidates > 0) {
    for (int32_t row = range.first; row < range.last; ++row) {
      RowToF32(run.kernels, run.plan.problem.dtype,
               run.QueryRow(unit, run.QueryHead(unit, item.member), row), g.head_dim,
               rows + static_cast<int64_t>(row - range.first) * g.head_dim);
    }
    const bool own = candidates > block;  // the diagonal block competes
    const int32_t earlier = own ? block : candidates;
    const float last =
        Measure(run, unit, rows, range.last - range.first, earlier, scores, energy);
    // No row of a short block sees the block's last token. The published code has rows
    // of zeros for the missing ones: they see every block, with logit 0.
    const int32_t missing = std::max((block + 1) * g.block_size - s.k_len, 0);
    const bool has_zero_rows = options.as_published && missing > 0;
    const float zero_rows = has_zero_rows ? static_cast<float>(missing) : 0.0f;
    float top = LargestLogit(energy, earlier);
    if (std::isnan(top) || !std::isfinite(last)) {
      run.non_finite = true;
      return;
    }
    if (own && missing == 0) top = std::max(top, last);
    if (has_zero_rows) top = std::max(top, 0.0f);
    float* block_scores = energy.sum;
    for (int32_t j = 0; j < earlier; ++j) {
      block_scores[j] =
          energy.sum[j] * std::exp2(energy.top[j] - top) + zero_rows * std::exp2(-top);
    }
    if (own) {
      block_scores[block] = missing == 0    ? std::exp2(last - top)
                            : has_zero_rows ? std::exp2(-top)
                                            : 0.0f;
    }
    KeepShareOfLargest(options.alpha, {block_scores, static_cast<size_t>(candidates)},
                       keep);
  }
  StoreList(run, unit, item.member, query_block, keep);
}

}  // namespace pbs::cpu
