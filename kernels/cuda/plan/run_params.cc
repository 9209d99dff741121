// Parameters of the kernels of one run: where its tensors and the regions of the plan
// are.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

#include "common/score_rounding.h"
#include "cuda/plan/cuda_plan.h"

namespace pbs::cuda {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

RowStrides StridesOf(const RowLayout& layout) {
  const bool packed = layout.sequence_stride == RowLayout::kPacked;
  return {packed ? 0 : layout.sequence_stride, layout.head_stride, layout.row_stride,
          packed ? 1 : 0};
}

// How many of what an operand has.
struct OperandSizes {
  int64_t sequences = 0;
  int64_t heads = 0;
  int64_t rows = 0;  // of the longest sequence
};

StatusOr<RowOperand> OperandOf(const char* name, const ConstRows& rows,
                               const OperandSizes& sizes) {
  const RowStrides strides = StridesOf(rows.layout);
  if (reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) {
    return InvalidArgument(std::string(name) + " is not 16-byte aligned");
  }
  struct Dimension {
    const char* field;
    int64_t stride;
    int64_t size;
  };
  for (const Dimension& d : {Dimension{"sequence_stride", strides.sequence,
                                       strides.packed != 0 ? 1 : sizes.sequences},
                             Dimension{"head_stride", strides.head, sizes.heads},
                             Dimension{"row_stride", strides.row, sizes.rows}}) {
    if (d.stride % 8 != 0) {
      return InvalidArgument(std::string(name) + " has a stride of " +
                             std::to_string(d.stride) +
                             " elements, not a multiple of 8");
    }
    if (d.size > 1 && d.stride <= 0) {
      return InvalidArgument(std::string(name) + "." + d.field + " " +
                             std::to_string(d.stride) + " is not positive");
    }
  }
  return RowOperand{static_cast<const uint16_t*>(rows.data), strides};
}

// Hands out pointers into the workspace.
class Placer {
 public:
  explicit Placer(Workspace workspace)
      : base_(static_cast<std::byte*>(workspace.data)) {}

  template <class T>
  void operator()(T*& pointer, int64_t offset) const {
    pointer = reinterpret_cast<T*>(base_ + offset);
  }

 private:
  std::byte* base_;
};

ScoreRounding RoundingTo(DType dtype) {
  return dtype == DType::kF32 ? ScoreRounding::kNone : ScoreRounding::kInputDType;
}

void SetSelection(const CudaAttentionPlan& plan, const AttentionTensors& tensors,
                  SelectionParams& s) {
  const AttentionGeometry& g = plan.geometry;
  const AttentionOptions& options = plan.problem.options;
  s.num_sequences = static_cast<int32_t>(plan.sequences.size());
  s.num_heads = g.num_heads;
  s.num_kv_heads = g.num_kv_heads;
  s.num_order_heads = g.num_order_heads;
  s.head_dim = g.head_dim;
  s.segment_size = g.segment_size;
  s.blocks_per_segment = g.blocks_per_segment;
  s.chunk_blocks = plan.chunk_blocks;
  s.group_blocks = plan.group_blocks;
  s.total_key_blocks = plan.total_key_blocks;
  s.copied_blocks = plan.copied_blocks;
  s.total_query_blocks = plan.total_query_blocks;
  s.total_chunks = plan.total_chunks;
  s.total_segments = plan.total_segments;
  s.total_groups = plan.total_groups;
  s.logit_stride = plan.logit_stride;
  const BandWidths widths = BandWidthsOf(plan.problem);
  const int32_t pairs = g.head_dim / 2;
  s.bands[0] = {pairs - widths.slow / 2, pairs};
  s.bands[1] = {0, widths.fast / 2};
  s.thresholds[0] = options.threshold;
  s.thresholds[1] =
      options.fast_threshold > 0 ? options.fast_threshold : options.threshold;
  if (plan.thresholds_by_head()) {
    s.bands_by_head = options.fast_threshold > 0 ? 1 : kBands;
  }
  s.force_first_block = ForcesFirstBlock(options) ? 1 : 0;
  s.share_log2 = std::log2(options.alpha);
  s.zero_rows = options.as_published ? 1 : 0;
  s.stride = options.stride;
  s.lags = options.as_published ? 1 : 0;
  s.dense_tail_blocks = options.dense_tail_blocks;
  s.sink_blocks = options.sink_blocks;
  s.window_blocks = options.window_blocks;
  s.own_has_mass = Permutes(options) ? 0 : 1;
  s.permutes = plan.permutes ? 1 : 0;
  s.pools = plan.pools_keys() ? 1 : 0;
  s.pools_by_length = plan.chooses_block_lines() ? 1 : 0;
  s.key_rounding = RoundingTo(ScoreRoundingOf(plan.problem));
  s.block_rounding = RoundingTo(BlockScoreRoundingOf(plan.problem));
  if (options.use_given_order) {
    s.given_order = static_cast<const int32_t*>(tensors.order.data);
    s.given_order_strides = StridesOf(tensors.order.layout);
  }
}

void SetLines(const CudaAttentionPlan& plan, const Placer& at, LineParams& lines) {
  const AttentionOptions& options = plan.problem.options;
  constexpr int32_t kPublishedWidth = 128;  // head dim of minference's published scale
  const int32_t width = plan.chooses_key_lines && options.as_published
                            ? kPublishedWidth
                            : plan.geometry.head_dim;
  lines.total_chunks = plan.total_line_chunks;
  lines.num_queries = plan.chooses_key_lines ? kKeyLineQueries : kProxies;
  lines.scale_log2 = kLog2E / std::sqrt(static_cast<float>(width));
  lines.has_grid = plan.has_grid() ? 1 : 0;
  lines.gamma = options.gamma;
  lines.tau = options.tau;
  lines.zero_is_far = options.as_published ? 1 : 0;
  at(lines.columns, plan.columns_at);
  at(lines.diagonals, plan.diagonals_at);
  at(lines.rest, plan.rest_at);
  at(lines.kept, plan.kept_lines_at);
  at(lines.by_grid, plan.by_grid_at);
  at(lines.grid, plan.grid_at);
  at(lines.cuts, plan.grid_cuts_at);
}

void PlaceSelection(const CudaAttentionPlan& plan, const AttentionTensors& tensors,
                    const Placer& at, SelectionParams& s) {
  at(s.sequences, plan.sequences_at);
  at(s.chunk_max, plan.chunk_max_at);
  at(s.chunk_sum, plan.chunk_sum_at);
  at(s.proxy_shift, plan.proxy_shift_at);
  at(s.proxy_weight, plan.proxy_weight_at);
  at(s.importance, plan.importance_at);
  at(s.positions, plan.positions_at);
  at(s.permuted_k, plan.permuted_k_at);
  at(s.permuted_v, plan.permuted_v_at);
  at(s.first_block, plan.first_block_at);
  at(s.pooled_keys, plan.pooled_keys_at);
  at(s.pooled_queries, plan.pooled_queries_at);
  at(s.band_divisors, plan.band_divisors_at);
  at(s.mean_rows, plan.mean_rows_at);
  at(s.head_thresholds, plan.head_thresholds_at);
  if (plan.pooled_queries_bytes > 0) {
    s.pooled_queries = const_cast<float*>(tensors.pooled_queries);  // only read
  }
  at(s.counts, plan.counts_at);
  at(s.entries, plan.entries_at);
  at(s.ordered, plan.summary_at + offsetof(RunSummary, ordered));
  at(s.non_finite, plan.summary_at + offsetof(RunSummary, non_finite));
}

void SetKeyLines(const CudaAttentionPlan& plan, const Placer& at,
                 KeyLineParams& lines) {
  if (!plan.chooses_key_lines) return;
  const AttentionOptions& options = plan.problem.options;
  lines.vertical_tokens = options.vertical_tokens;
  lines.slash_tokens = options.slash_tokens;
  lines.total_gathered = plan.total_gathered;
  at(lines.distances, plan.key_lines_at.distances);
  at(lines.chosen, plan.key_lines_at.chosen);
  at(lines.column_bits, plan.key_lines_at.column_bits);
  at(lines.distance_bits, plan.key_lines_at.distance_bits);
  at(lines.parts, plan.key_lines_at.parts);
  at(lines.gathered, plan.key_lines_at.gathered);
  at(lines.column_ends, plan.key_lines_at.column_ends);
}

void SetTileOrder(const CudaAttentionPlan& plan, const AttentionTensors& tensors,
                  const Placer& at, RunParams& run) {
  const AttentionGeometry& g = plan.geometry;
  const AttentionOptions& options = plan.problem.options;
  const SelectionParams& s = run.selection;
  TileOrderParams& t = run.tile_order;
  t.sequences = s.sequences;
  t.num_sequences = s.num_sequences;
  t.num_heads = g.num_heads;
  t.num_order_heads = g.num_order_heads;
  t.num_read_heads = plan.permutes ? g.num_order_heads : g.num_kv_heads;
  t.blocks_per_segment = g.blocks_per_segment;
  t.total_tiles = static_cast<int32_t>(plan.num_tiles());
  t.tile_rows = plan.tile_rows;
  t.one_section = plan.one_section ? 1 : 0;
  t.longest = plan.longest_list + plan.most_gathered;
  t.dense_fallback = plan.may_fall_back() ? 1 : 0;
  t.fallback_ratio = static_cast<float>(kDenseFallbackRatio);
  t.permuted = s.permutes;
  if (options.use_given_lists && plan.has_lists) {
    t.counts = tensors.lists.count;
    t.given_begin = tensors.lists.begin;
    t.given_entries = tensors.lists.indices;
  } else if (plan.selects) {
    t.counts = s.counts;
  }
  t.entries = run.selection.entries;
  t.gathered = s.key_lines.gathered;
  at(t.tiles, plan.tiles_at);
  at(t.next_tile, plan.next_tile_at);
  at(t.fell_back, plan.fell_back_at);
  if (plan.has_lists) at(t.heads, plan.head_blocks_at);
  if (!plan.selects) t.ordered = s.ordered;
  at(t.listed, plan.summary_at + offsetof(RunSummary, listed));
}

// After the others.
void SetAttention(const CudaAttentionPlan& plan, const AttentionTensors& tensors,
                  RunParams& run) {
  const AttentionGeometry& g = plan.geometry;
  const SelectionParams& s = run.selection;
  const TileOrderParams& t = run.tile_order;
  AttentionParams& a = run.attention;
  a.tiles = t.tiles;
  a.num_tiles = t.total_tiles;
  a.next_tile = t.next_tile;
  a.lists = t.entries;
  a.parts = s.key_lines.parts;
  a.column_bits = s.key_lines.column_bits;
  a.column_stride = int64_t{plan.total_key_blocks} * (kBlockTokens / 32);
  a.scale_log2 = kLog2E / std::sqrt(static_cast<float>(g.head_dim));
  a.o = tensors.o.data;
  a.o_strides = StridesOf(tensors.o.layout);
  a.lse = static_cast<float*>(tensors.lse.data);
  a.lse_strides = StridesOf(tensors.lse.layout);
  run.q = s.q;
  run.k = s.k;
  run.v = s.v;
  if (plan.permutes) {
    const int64_t slots = int64_t{plan.copied_blocks} * kBlockTokens;
    const RowStrides strides = {0, slots * g.head_dim, g.head_dim, 1};
    a.positions = s.positions;
    a.position_stride = slots;
    run.k = {s.permuted_k, strides};
    run.v = {s.permuted_v, strides};
  }
}

// After attention's. Attention then writes the LSE that the correction goes on from.
void SetCorrection(const CudaAttentionPlan& plan, const Placer& at, RunParams& run) {
  if (!plan.corrects) return;
  if (run.attention.lse == nullptr) {
    at(run.attention.lse, plan.lse_at);
    run.attention.lse_strides = StridesOf(PackedLayout(plan.geometry.total_q, 1));
  }
  CorrectionParams& c = run.correction;
  const TileOrderParams& t = run.tile_order;
  c.attention = run.attention;
  c.q = run.q;
  c.k = run.k;
  c.v = run.v;
  c.sequences = t.sequences;
  c.num_sequences = t.num_sequences;
  c.num_read_heads = t.num_read_heads;
  c.blocks_per_segment = t.blocks_per_segment;
  c.total_key_blocks = plan.total_key_blocks;
  c.permuted = t.permuted;
  at(c.means, plan.means_at);
}

// After attention's.
void SetCoverage(const CudaAttentionPlan& plan, const Placer& at, RunParams& run) {
  CoverageParams& c = run.coverage;
  const TileOrderParams& t = run.tile_order;
  c.sequences = t.sequences;
  c.num_sequences = t.num_sequences;
  c.num_heads = t.num_heads;
  c.num_order_heads = t.num_order_heads;
  c.num_read_heads = t.num_read_heads;
  c.blocks_per_segment = t.blocks_per_segment;
  c.rows = plan.problem.options.coverage_rows;
  c.total_groups = plan.coverage_groups;
  c.q = run.q;
  c.k = run.k;
  c.positions = run.attention.positions;
  c.position_stride = run.attention.position_stride;
  c.scale_log2 = run.attention.scale_log2;
  c.counts = t.counts;
  c.entries = t.entries;
  c.parts = run.attention.parts;
  c.column_bits = run.attention.column_bits;
  c.column_ends = run.selection.key_lines.column_ends;
  c.column_stride = run.attention.column_stride;
  at(c.coverage, plan.coverage_at);
  if (plan.guards()) {  // before heads may fall back
    run.guard = {c, plan.problem.options.coverage_min, run.selection.counts,
                 run.selection.entries, nullptr};
    at(run.guard.guarded, plan.guarded_at);
    c.is_measured = 1;
  }
  if (plan.may_fall_back()) c.fell_back = t.fell_back;
}

}  // namespace

StatusOr<RunParams> MakeRunParams(const CudaAttentionPlan& plan,
                                  const AttentionTensors& tensors,
                                  Workspace workspace) {
  if (workspace.bytes < plan.workspace_bytes) {
    return ResourceExhausted("the workspace has " + std::to_string(workspace.bytes) +
                             " bytes, the plan needs " +
                             std::to_string(plan.workspace_bytes));
  }
  if (plan.pooled_queries_bytes > 0 && tensors.pooled_queries == nullptr) {
    return InvalidArgument("pooled_queries is null, the plan needs " +
                           std::to_string(plan.pooled_queries_bytes) + " bytes");
  }
  PBS_RETURN_IF_ERROR(ValidateHeadThresholds(plan.problem, tensors.head_thresholds));
  const AttentionGeometry& g = plan.geometry;
  OperandSizes queries{static_cast<int64_t>(g.sequences.size()), g.num_heads, 0};
  OperandSizes keys{queries.sequences, g.num_kv_heads, 0};
  for (const SequenceGeometry& s : g.sequences) {
    queries.rows = std::max<int64_t>(queries.rows, s.q_len);
    keys.rows = std::max<int64_t>(keys.rows, s.k_len);
  }
  auto q = OperandOf("q", tensors.q, queries);
  if (!q.ok()) return q.status();
  auto k = OperandOf("k", tensors.k, keys);
  if (!k.ok()) return k.status();
  auto v = OperandOf("v", tensors.v, keys);
  if (!v.ok()) return v.status();
  const auto o = OperandOf("o", {tensors.o.data, tensors.o.layout}, queries);
  if (!o.ok()) return o.status();
  RunParams run{};
  run.selection.q = *q;
  run.selection.k = *k;
  run.selection.v = *v;
  if (plan.thresholds_by_head()) run.head_thresholds = tensors.head_thresholds;
  const Placer at(workspace);
  at(run.summary, plan.summary_at);
  SetSelection(plan, tensors, run.selection);
  PlaceSelection(plan, tensors, at, run.selection);
  SetLines(plan, at, run.selection.lines);
  SetKeyLines(plan, at, run.selection.key_lines);
  SetTileOrder(plan, tensors, at, run);
  SetAttention(plan, tensors, run);
  SetCorrection(plan, at, run);
  SetCoverage(plan, at, run);
  return run;
}

}  // namespace pbs::cuda
