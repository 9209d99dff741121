// Scores blocks by sampled antidiagonals (xattention, arXiv 2503.16428).
//
// Row i of the strided queries is the tokens i * stride .. i * stride + stride - 1 in
// falling order, column j of the strided keys the tokens j * stride .. in rising order.
// Their product sums every stride-th antidiagonal. Softmax over the columns j <= i,
// then sums over the rows and columns of a block, give the block's mass.
//
// Keys are multiplied in chunks of columns. Each (row, chunk) keeps its own largest
// logit, so that memory grows with rows x blocks, not with rows x columns.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "cpu/attention_select.h"
#include "methods/block_selection.h"

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int32_t kOutputs = 32;     // the fewest that the softmax takes
constexpr int32_t kChunkCols = 256;  // a multiple of every table's panel width

struct Sizes {
  Sizes(const CpuAttentionPlan& plan, const SequenceGeometry& s)
      : stride(plan.problem.options.stride),
        per_block(plan.geometry.block_size / stride),
        depth(int64_t{stride} * plan.geometry.head_dim),
        rows(plan.scorer.tile * per_block),
        chunks(static_cast<int32_t>((plan.FoldedColumns(s) + kChunkCols - 1) /
                                    kChunkCols)) {}

  int32_t stride;
  int32_t per_block;  // strided rows of a block
  int64_t depth;
  int32_t rows;  // strided query rows of an item
  int32_t chunks;
};

struct Item {
  float* queries;  // [rows, depth]
  float* scores;   // [rows, kChunkCols]
  float* tops;     // [rows, chunks] largest logit of a chunk, in units of log2
  float* partial;  // [rows, blocks] sums of 2^(logit - top of its chunk)
  float* masses;   // [blocks]
  // State of the vector softmax of one chunk: [rows] largest and sum, and the outputs
  // that it rescales, which nobody reads.
  float* row_max;
  float* row_sum;
  float* outputs;  // [rows, kOutputs]
};

// Strided rows of the item's query blocks; zeros where there is no query.
void LoadRows(const AttentionRun& run, const Unit& unit, const SelectItem& item,
              const Sizes& sizes, float* queries) {
  const AttentionGeometry& g = run.plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t begin = (s.first_query_block + item.first_block) * g.block_size;
  const int32_t head = run.QueryHead(unit, item.member);
  const int32_t num_rows = item.num_blocks * sizes.per_block;
  for (int32_t i = 0; i < num_rows; ++i) {
    for (int32_t t = 0; t < sizes.stride; ++t) {
      float* out = queries + i * sizes.depth + int64_t{t} * g.head_dim;
      const int32_t row = begin + (i + 1) * sizes.stride - 1 - t - s.query_offset;
      if (row < 0 || row >= s.q_len) {
        std::fill_n(out, g.head_dim, 0.0f);
      } else {
        RowToF32(run.kernels, run.plan.problem.dtype, run.QueryRow(unit, head, row),
                 g.head_dim, out);
      }
    }
  }
}

// One row of a chunk: its largest logit and the sums of its blocks. `visible` columns
// count. False when a logit is not finite.
bool SumRow(float scale, float* scores, int32_t visible, int32_t per_block,
            int32_t first_block, float* top, float* partial) {
  *top = -INFINITY;
  for (int32_t j = 0; j < visible; ++j) {
    scores[j] *= scale;
    if (!std::isfinite(scores[j])) return false;
    *top = std::max(*top, scores[j]);
  }
  for (int32_t j = 0; j < visible; ++j) {
    partial[first_block + j / per_block] += std::exp2(scores[j] - *top);
  }
  return true;
}

// The same for all rows of a chunk that every row sees whole.
bool SumWholeChunk(const AttentionRun& run, const Sizes& sizes, const Item& at,
                   float scale, int32_t num_rows, int32_t cols, int32_t chunk,
                   int32_t num_key_blocks) {
  std::fill_n(at.row_max, num_rows, -INFINITY);
  std::fill_n(at.row_sum, num_rows, 0.0f);
  std::fill_n(at.outputs, int64_t{num_rows} * kOutputs, 0.0f);
  run.kernels.softmax({.rows = num_rows,
                       .cols = cols,
                       .head_dim = kOutputs,
                       .scale = scale,
                       .positions = nullptr,
                       .first_query = 0,
                       .scores = at.scores,
                       .pairs = nullptr,
                       .row_max = at.row_max,
                       .row_sum = at.row_sum,
                       .out = at.outputs});
  const int32_t first_block = chunk * kChunkCols / sizes.per_block;
  for (int32_t i = 0; i < num_rows; ++i) {
    if (!std::isfinite(at.row_max[i]) || !std::isfinite(at.row_sum[i])) return false;
    at.tops[int64_t{i} * sizes.chunks + chunk] = at.row_max[i];
    const float* scores = at.scores + int64_t{i} * cols;
    float* partial = at.partial + int64_t{i} * num_key_blocks + first_block;
    for (int32_t j = 0; j < cols; j += sizes.per_block) {
      *partial++ = std::accumulate(scores + j, scores + j + sizes.per_block, 0.0f);
    }
  }
  return true;
}

// Columns that a strided row sees: those up to its own, and with sorted keys only
// candidates, because the own segment has no diagonal.
int32_t VisibleColumns(const AttentionRun& run, const Unit& unit, const Sizes& sizes,
                       int32_t row) {
  const int32_t query_block =
      row / sizes.per_block - run.Sequence(unit).first_query_block;
  return std::min(row + 1, NumCandidates(run, unit, query_block) * sizes.per_block);
}

// Fills `tops` and `partial` of all rows. False when a logit is not finite.
bool MeasureChunks(const AttentionRun& run, const Unit& unit, const SelectItem& item,
                   const Sizes& sizes, const Item& at) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t num_rows = item.num_blocks * sizes.per_block;
  const int32_t first_row = (s.first_query_block + item.first_block) * sizes.per_block;
  const auto columns = static_cast<int32_t>(plan.FoldedColumns(s));
  const float scale = kLog2E / (std::sqrt(static_cast<float>(plan.geometry.head_dim)) *
                                static_cast<float>(sizes.stride));
  const float* keys = run.Pooled(unit) + plan.Pooled(s).folded;
  std::fill_n(at.partial, int64_t{num_rows} * s.num_key_blocks, 0.0f);
  for (int32_t chunk = 0; chunk < sizes.chunks; ++chunk) {
    const int32_t first = chunk * kChunkCols;
    if (first >= first_row + num_rows) break;
    const int32_t cols = std::min(kChunkCols, columns - first);
    run.kernels.gemm(
        {.rows = num_rows,
         .cols = cols,
         .depth = static_cast<int32_t>(sizes.depth),
         .a = reinterpret_cast<const uint32_t*>(at.queries),
         .a_stride = sizes.depth,
         .b = reinterpret_cast<const uint32_t*>(keys + first * sizes.depth),
         .c = at.scores,
         .c_stride = cols});
    if (VisibleColumns(run, unit, sizes, first_row) >= first + cols) {
      if (!SumWholeChunk(run, sizes, at, scale, num_rows, cols, chunk,
                         s.num_key_blocks)) {
        return false;
      }
      continue;
    }
    for (int32_t i = 0; i < num_rows; ++i) {
      const int32_t visible =
          std::clamp(VisibleColumns(run, unit, sizes, first_row + i) - first, 0, cols);
      if (!SumRow(scale, at.scores + int64_t{i} * cols, visible, sizes.per_block,
                  first / sizes.per_block, at.tops + int64_t{i} * sizes.chunks + chunk,
                  at.partial + int64_t{i} * s.num_key_blocks)) {
        return false;
      }
    }
  }
  return true;
}

// Adds the softmax of one strided row to the masses of the blocks [0, count).
void AddRow(const Sizes& sizes, const Item& at, int32_t row, int32_t num_key_blocks,
            int32_t count) {
  const float* tops = at.tops + int64_t{row} * sizes.chunks;
  const float* partial = at.partial + int64_t{row} * num_key_blocks;
  const int32_t blocks_per_chunk = std::max(1, kChunkCols / sizes.per_block);
  const int32_t chunks = (count - 1) / blocks_per_chunk + 1;
  const float top = *std::max_element(tops, tops + chunks);
  double sum = 0;
  for (int32_t j = 0; j < count; ++j) {
    sum += partial[j] * std::exp2(tops[j / blocks_per_chunk] - top);
  }
  for (int32_t j = 0; j < count; ++j) {
    at.masses[j] += static_cast<float>(
        partial[j] * std::exp2(tops[j / blocks_per_chunk] - top) / sum);
  }
}

// Key blocks of the chunk whose rows the published code ranks differently.
int32_t FirstChunkBlocks(int32_t k_len, int32_t block_size) {
  int64_t power = 1;
  while (power < k_len) power *= 2;
  const int64_t chunk = std::max<int64_t>(
      std::min(std::max<int64_t>(2048, power), (1 << 28) / power), 2048);
  return static_cast<int32_t>(chunk / block_size);
}

}  // namespace

int64_t AntidiagonalsWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  const Sizes sizes(plan, s);
  const int64_t rows = sizes.rows;
  return RoundUp(rows * sizes.depth, kLanePad) + rows * kChunkCols +
         RoundUp(rows * sizes.chunks, kLanePad) +
         RoundUp(rows * s.num_key_blocks, kLanePad) + 2 * RoundUp(rows, kLanePad) +
         rows * kOutputs + 3 * RoundUp(s.num_key_blocks, kLanePad) +
         RoundUp(s.num_key_blocks / 4 + 1, kLanePad);
}

void SelectByAntidiagonals(AttentionRun& run, const Unit& unit, const SelectItem& item,
                           int worker) {
  const AttentionGeometry& g = run.plan.geometry;
  const AttentionOptions& options = run.plan.problem.options;
  const SequenceGeometry& s = run.Sequence(unit);
  const Sizes sizes(run.plan, s);
  ItemScratch scratch(run, worker);
  const Item at = {.queries = scratch.Floats(sizes.rows * sizes.depth),
                   .scores = scratch.Floats(int64_t{sizes.rows} * kChunkCols),
                   .tops = scratch.Floats(int64_t{sizes.rows} * sizes.chunks),
                   .partial = scratch.Floats(int64_t{sizes.rows} * s.num_key_blocks),
                   .masses = scratch.Floats(s.num_key_blocks),
                   .row_max = scratch.Floats(sizes.rows),
                   .row_sum = scratch.Floats(sizes.rows),
                   .outputs = scratch.Floats(int64_t{sizes.rows} * kOutputs)};
  const std::span<uint64_t> sort_keys = scratch.SortKeys(s.num_key_blocks);
  const std::span<uint8_t> keep = scratch.Keep(s.num_key_blocks);
  LoadRows(run, unit, item, sizes, at.queries);
  if (!MeasureChunks(run, unit, item, sizes, at)) {
    run.non_finite = true;
    return;
  }
  const int32_t live_rows = (s.k_len + sizes.stride - 1) / sizes.stride;
  for (int32_t i = 0; i < item.num_blocks; ++i) {
    const int32_t query_block = item.first_block + i;
    const int32_t block = s.first_query_block + query_block;
    std::fill(keep.begin(), keep.end(), uint8_t{0});
    std::fill_n(at.masses, block + 1, 0.0f);
    const int32_t first_row = s.query_offset / sizes.stride;
    const int32_t candidates = NumCandidates(run, unit, query_block);
    for (int32_t r = 0; r < sizes.per_block && candidates > 0; ++r) {
      const int32_t row = block * sizes.per_block + r;
      if (row < first_row || row >= live_rows) continue;
      AddRow(sizes, at, i * sizes.per_block + r, s.num_key_blocks, candidates);
    }
    const ForcedMass forced = {
        .own = candidates > block ? block : -1,
        .first = ForcesFirstBlock(options) ? run.FirstBlock(unit) : -1,
        .lags =
            options.as_published && block < FirstChunkBlocks(s.k_len, g.block_size)};
    KeepCoverWithForced(run.Threshold(unit, item.member), forced,
                        {at.masses, static_cast<size_t>(candidates)}, sort_keys, keep);
    StoreList(run, unit, item.member, query_block, keep);
  }
}

}  // namespace pbs::cpu
