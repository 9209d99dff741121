#include "cuda/plan/cuda_plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <string>

#include "common/score_rounding.h"

namespace pbs::cuda {
namespace {

// A group's logits stay below this much shared memory.
constexpr int32_t kLogitBytesMax = 64 << 10;
// Tiles of short prompts are ordered as one section.
constexpr int64_t kOneSectionTilesMax = 4096;
// Multiprocessors should have a few chunks each.
constexpr int32_t kChunksPerMultiprocessor = 4;

template <class Field>
Status Unsupported(const char* field, const Field& value, const char* supported) {
  return Unimplemented(std::string(field) + " " + value + " is not supported by the " +
                       "cuda backend, which has " + supported);
}

Status CheckSupported(const AttentionProblem& problem) {
  if (problem.dtype == DType::kF32) return Unsupported("dtype", "f32", "f16 and bf16");
  const int32_t head_dim = problem.shape.head_dim;
  if (std::find(kCudaHeadDims.begin(), kCudaHeadDims.end(), head_dim) ==
      kCudaHeadDims.end()) {
    return Unsupported("head_dim", std::to_string(head_dim), "64, 96, 128 and 256");
  }
  if (problem.options.block_size != kBlockTokens) {
    return Unsupported("block_size", std::to_string(problem.options.block_size), "128");
  }
  if (problem.options.coverage_min > 0) {
    return Unsupported("coverage_min", std::to_string(problem.options.coverage_min),
                       "0");
  }
  if (problem.options.mean_correction) {
    return Unsupported("mean_correction", "true", "false");
  }
  if (problem.has_head_thresholds) {
    return Unsupported("has_head_thresholds", "true", "false");
  }
  return CheckMethods(problem.options, kCudaMethods, "cuda");
}

int32_t CeilDiv(int32_t value, int32_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Of one head.
int32_t TilesOf(const CudaAttentionPlan& plan, const SequenceGeometry& s) {
  return plan.tile_rows == kTileRows ? s.num_query_blocks
                                     : CeilDiv(s.q_len, plan.tile_rows);
}

// Stages, and key blocks and query blocks that are worked on together.
void ChooseStages(const DeviceTraits& device, CudaAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  const AttentionOptions& options = plan.problem.options;
  int32_t longest = 0;
  int64_t scored_blocks = 0;
  bool sparse = false;
  for (const SequenceGeometry& s : g.sequences) {
    longest = std::max(longest, s.num_key_blocks);
    if (s.dense || s.q_len == 0) continue;
    sparse = true;
    scored_blocks += s.k_len / g.segment_size * g.blocks_per_segment;
  }
  plan.has_lists = sparse;
  plan.permutes = sparse && Permutes(options);
  plan.orders = plan.permutes && !options.use_given_order;
  plan.selects = sparse && !options.use_given_lists;
  if (plan.selects) plan.scorer = TraitsOf(options.method).scorer;
  // A run of several sequences is pooled here: its blocks lie on as many grids.
  const bool given = plan.problem.offers_pooled_queries && g.sequences.size() == 1;
  plan.pools_queries = plan.needs_pooled_queries() && !given;

  const int64_t wanted = int64_t{kChunksPerMultiprocessor} * device.num_multiprocessors;
  plan.chunk_blocks = static_cast<int32_t>(std::clamp<int64_t>(
      scored_blocks * g.num_order_heads / std::max<int64_t>(wanted, 1), 1,
      kChunkBlocksMax));
  while (plan.chunk_blocks > 1 &&
         ScoreSharedBytes(g.head_dim, plan.chunk_blocks) > device.shared_bytes_max) {
    --plan.chunk_blocks;
  }
  plan.logit_stride = CeilDiv(std::max(longest, 1), 32) * 32;
  plan.group_blocks = kGroupBlocksMax * plan.logit_stride * 4 <= kLogitBytesMax
                          ? kGroupBlocksMax
                          : kGroupBlocksMin;
  plan.longest_list = longest;
  if (device.wide_tiles && g.head_dim == 64 && !sparse) plan.tile_rows = kWideTileRows;
  for (const SequenceGeometry& s : g.sequences) plan.tiles_per_head += TilesOf(plan, s);
  plan.one_section = (device.one_section || plan.num_tiles() <= kOneSectionTilesMax) &&
                     !options.dense_fallback;
}

void MakeRecords(CudaAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  int32_t tiles = 0;  // of one head
  for (const SequenceGeometry& s : g.sequences) {
    const bool sparse = !s.dense && s.q_len > 0;
    const bool scored = plan.orders && sparse;
    SequenceRecord record{};
    record.entries_begin = s.entries_begin;
    record.entries_per_head = s.entries_per_head;
    record.q_begin = static_cast<int32_t>(s.q_begin);
    record.q_len = s.q_len;
    record.k_begin = static_cast<int32_t>(s.k_begin);
    record.k_len = s.k_len;
    record.query_offset = s.query_offset;
    record.key_block_begin = plan.total_key_blocks;
    record.num_key_blocks = s.num_key_blocks;
    record.query_block_begin = plan.total_query_blocks;
    record.num_query_blocks = s.num_query_blocks;
    record.first_query_block = s.first_query_block;
    record.chunk_begin = plan.total_chunks;
    record.segment_begin = plan.total_segments;
    record.group_begin = plan.total_groups;
    const int32_t segments = scored ? s.k_len / g.segment_size : 0;
    record.scored_blocks = segments * g.blocks_per_segment;
    record.sparse = sparse ? 1 : 0;
    record.tile_begin = tiles;
    tiles += TilesOf(plan, s);
    record.coverage_begin = plan.coverage_groups;
    plan.sequences.push_back(record);
    plan.total_key_blocks += s.num_key_blocks;
    plan.total_query_blocks += s.num_query_blocks;
    plan.total_chunks += CeilDiv(record.scored_blocks, plan.chunk_blocks);
    plan.total_segments += segments;
    plan.total_groups += sparse ? CeilDiv(s.num_query_blocks, plan.group_blocks) : 0;
    const int32_t sampled =
        SampledRows(plan.problem.options.coverage_rows, record.q_len);
    plan.coverage_groups += sparse ? CeilDiv(sampled, kCoverageRowsTogether) : 0;
  }
}

void PlaceRegions(CudaAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t slots = int64_t{plan.total_key_blocks} * kBlockTokens;
  const int64_t order_heads = g.num_order_heads;
  const auto num_sequences = static_cast<int64_t>(plan.sequences.size());
  const int64_t scored = plan.orders ? 1 : 0;
  const int64_t moved = plan.permutes ? 1 : 0;
  const int64_t selected = plan.selects ? 1 : 0;
  WorkspaceLayout layout;
  plan.sequences_at = layout.Add<SequenceRecord>(num_sequences);
  plan.next_tile_at = layout.Add<int32_t>(1);
  plan.tiles_at = layout.Add<AttentionTile>(plan.num_tiles() + 1);
  plan.summary_at = layout.Add<RunSummary>(1);
  plan.head_blocks_at = layout.Add<BlockCounts>(plan.has_lists ? g.num_heads : 0);
  plan.fell_back_at =
      layout.Add<int32_t>(plan.may_fall_back() ? order_heads * num_sequences : 0);
  plan.coverage_at = layout.Add<float>(int64_t{plan.coverage_groups} * g.num_heads *
                                       kCoverageRowsTogether);
  plan.summary_bytes = layout.bytes() - plan.summary_at;
  plan.memory.scratch_bytes = layout.TakePart();

  plan.positions_at = layout.Add<int32_t>(moved * order_heads * slots);
  plan.memory.order_bytes = layout.TakePart();

  plan.counts_at = layout.Add<uint16_t>(selected * plan.num_tiles());
  plan.entries_at = layout.Add<uint16_t>(plan.has_lists ? g.total_entries : 0);
  plan.memory.lists_bytes = layout.TakePart();

  plan.permuted_k_at = layout.Add<uint16_t>(moved * order_heads * slots * g.head_dim);
  plan.permuted_v_at = layout.Add<uint16_t>(moved * order_heads * slots * g.head_dim);
  plan.memory.packed_bytes = layout.TakePart();

  const int64_t chunk_rows = scored * g.num_heads * plan.total_chunks * kProxies;
  const int64_t proxy_rows = scored * g.num_heads * num_sequences * kProxies;
  plan.chunk_max_at = layout.Add<float>(chunk_rows);
  plan.chunk_sum_at = layout.Add<float>(chunk_rows);
  plan.proxy_shift_at = layout.Add<float>(proxy_rows);
  plan.proxy_weight_at = layout.Add<float>(proxy_rows);
  plan.importance_at = layout.Add<float>(scored * order_heads * slots);
  plan.first_block_at = layout.Add<int32_t>(selected * order_heads * num_sequences);
  plan.pooled_keys_at =
      layout.Add<float>(selected * order_heads * g.head_dim * plan.total_key_blocks);
  const int64_t means = int64_t{plan.total_query_blocks} * g.num_heads * g.head_dim;
  plan.pooled_queries_at = layout.Add<float>(plan.pools_queries ? means : 0);
  plan.pooled_queries_bytes =
      plan.needs_pooled_queries() && !plan.pools_queries ? 4 * means : 0;
  plan.band_divisors_at = layout.Add<float>(
      plan.scorer == Scorer::kBands ? g.num_heads * num_sequences * kBands : 0);
  const int64_t split = plan.scorer == Scorer::kRows ? kMeanParts : 0;
  plan.mean_rows_at =
      layout.Add<uint16_t>(split * order_heads * g.head_dim * plan.total_key_blocks);
  plan.memory.pooled_bytes = layout.TakePart();
  plan.workspace_bytes = layout.bytes();
}

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
  s.force_first_block = ForcesFirstBlock(options) ? 1 : 0;
  s.share_log2 = std::log2(options.alpha);
  s.zero_rows = options.as_published ? 1 : 0;
  s.dense_tail_blocks = options.dense_tail_blocks;
  s.sink_blocks = options.sink_blocks;
  s.window_blocks = options.window_blocks;
  s.own_has_mass = Permutes(options) ? 0 : 1;
  s.permutes = plan.permutes ? 1 : 0;
  s.pools = plan.selects ? 1 : 0;
  s.key_rounding = RoundingTo(ScoreRoundingOf(plan.problem));
  s.block_rounding = RoundingTo(BlockScoreRoundingOf(plan.problem));
  if (options.use_given_order) {
    s.given_order = static_cast<const int32_t*>(tensors.order.data);
    s.given_order_strides = StridesOf(tensors.order.layout);
  }
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
  if (plan.pooled_queries_bytes > 0) {
    s.pooled_queries = const_cast<float*>(tensors.pooled_queries);  // only read
  }
  at(s.counts, plan.counts_at);
  at(s.entries, plan.entries_at);
  at(s.ordered, plan.summary_at + offsetof(RunSummary, ordered));
  at(s.non_finite, plan.summary_at + offsetof(RunSummary, non_finite));
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
  t.longest = plan.longest_list;
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
  a.scale_log2 = 1.44269504088896341f / std::sqrt(static_cast<float>(g.head_dim));
  a.o = tensors.o.data;
  a.o_strides = StridesOf(tensors.o.layout);
  a.lse = static_cast<float*>(tensors.lse.data);
  a.lse_strides = StridesOf(tensors.lse.layout);
  run.q = s.q;
  run.k = s.k;
  run.v = s.v;
  if (plan.permutes) {
    const int64_t slots = int64_t{plan.total_key_blocks} * kBlockTokens;
    const RowStrides strides = {0, slots * g.head_dim, g.head_dim, 1};
    a.positions = s.positions;
    a.position_stride = slots;
    run.k = {s.permuted_k, strides};
    run.v = {s.permuted_v, strides};
  }
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
  if (plan.may_fall_back()) c.fell_back = t.fell_back;
  at(c.coverage, plan.coverage_at);
}

}  // namespace

StatusOr<std::unique_ptr<CudaAttentionPlan>> MakeCudaPlan(
    const AttentionProblem& problem, const DeviceTraits& device) {
  if (Status status = ValidateProblem(problem); !status.ok()) return status;
  if (Status status = CheckSupported(problem); !status.ok()) return status;
  auto plan = std::make_unique<CudaAttentionPlan>();
  plan->problem = problem;
  plan->geometry = MakeGeometry(problem);
  ChooseStages(device, *plan);
  if (plan->selects) {
    const int32_t head_dim = plan->geometry.head_dim;
    const int64_t bytes =
        plan->scorer == Scorer::kRows
            ? RowsSharedBytes(head_dim, plan->logit_stride)
            : SelectionSharedBytes(plan->group_blocks, plan->logit_stride, head_dim,
                                   plan->num_bands());
    if (bytes > device.shared_bytes_max) {
      return Unimplemented("block scores of the longest sequence take " +
                           std::to_string(bytes) + " bytes of shared memory; this " +
                           "device has " + std::to_string(device.shared_bytes_max));
    }
  }
  MakeRecords(*plan);
  PlaceRegions(*plan);
  return plan;
}

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
  const Placer at(workspace);
  at(run.summary, plan.summary_at);
  SetSelection(plan, tensors, run.selection);
  PlaceSelection(plan, tensors, at, run.selection);
  SetTileOrder(plan, tensors, at, run);
  SetAttention(plan, tensors, run);
  SetCoverage(plan, at, run);
  return run;
}

}  // namespace pbs::cuda
