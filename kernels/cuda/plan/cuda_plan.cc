#include "cuda/plan/cuda_plan.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>

namespace pbs::cuda {
namespace {

// A group's logits stay below this much shared memory.
constexpr int32_t kLogitBytesMax = 64 << 10;
// Tiles of short prompts are ordered as one section.
constexpr int64_t kOneSectionTilesMax = 4096;
// Multiprocessors should have a few chunks each.
constexpr int32_t kChunksPerMultiprocessor = 4;
// Lists have 16 bits for a block.
constexpr int32_t kListedBlocksMax = 1 << 16;

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
  return OkStatus();
}

int32_t CeilDiv(int32_t value, int32_t divisor) {
  return (value + divisor - 1) / divisor;
}

// Of one head.
int32_t TilesOf(const CudaAttentionPlan& plan, const SequenceGeometry& s) {
  return plan.tile_rows == kTileRows ? s.num_query_blocks
                                     : CeilDiv(s.q_len, plan.tile_rows);
}

// Query blocks whose lists one thread block makes.
int32_t GroupBlocks(const DeviceTraits& device, const CudaAttentionPlan& plan) {
  if (plan.scorer != Scorer::kAntidiagonal) {
    const bool many = kGroupBlocksMax * plan.logit_stride * 4 <= kLogitBytesMax;
    return many ? kGroupBlocksMax : kGroupBlocksMin;
  }
  // A query block has kBlockTokens / stride strided rows.
  int32_t blocks = std::min(plan.problem.options.stride, kAntidiagonalBlocksMax);
  while (blocks > 1 &&
         AntidiagonalSharedBytes(plan.geometry.head_dim, blocks, plan.logit_stride) >
             device.shared_bytes_max) {
    blocks /= 2;
  }
  return blocks;
}

// Shared memory of the kernel that scores blocks.
int64_t ScorerSharedBytes(const CudaAttentionPlan& plan) {
  const int32_t head_dim = plan.geometry.head_dim;
  switch (plan.scorer) {
    case Scorer::kRows:
      return RowsSharedBytes(head_dim, plan.logit_stride);
    case Scorer::kAntidiagonal:
      return AntidiagonalSharedBytes(head_dim, plan.group_blocks, plan.logit_stride);
    case Scorer::kLines:
      if (plan.chooses_key_lines) return SpansSharedBytes(plan.logit_stride);
      return std::max(ChooseLinesSharedBytes(plan.logit_stride, head_dim),
                      plan.has_grid()
                          ? SelectionSharedBytes(plan.group_blocks, plan.logit_stride,
                                                 head_dim, /*num_bands=*/1)
                          : 0);
    default:
      return SelectionSharedBytes(plan.group_blocks, plan.logit_stride, head_dim,
                                  plan.num_bands());
  }
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
  plan.corrects = sparse && options.mean_correction;
  plan.selects = sparse && !options.use_given_lists;
  if (plan.selects) plan.scorer = TraitsOf(options.method).scorer;
  plan.chooses_key_lines =
      plan.selects && TraitsOf(options.method).rule == Rule::kLargestLines;
  plan.permutes = (sparse && Permutes(options)) || plan.chooses_key_lines;
  plan.orders = sparse && Permutes(options) && !options.use_given_order;
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
  plan.group_blocks = GroupBlocks(device, plan);
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
    record.gathered_begin = plan.total_gathered;
    if (plan.chooses_key_lines && sparse) {
      record.gathered_blocks = CeilDiv(
          NumColumns(plan.problem.options.vertical_tokens, s.k_len), kBlockTokens);
    }
    plan.total_gathered += record.gathered_blocks;
    plan.most_gathered = std::max(plan.most_gathered, record.gathered_blocks);
    record.entries_begin = plan.total_entries;
    record.entries_per_head =
        s.entries_per_head + int64_t{s.num_query_blocks} * record.gathered_blocks;
    plan.total_entries += record.entries_per_head * g.num_heads;
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
    record.line_chunk_begin = plan.total_line_chunks;
    plan.sequences.push_back(record);
    plan.total_key_blocks += s.num_key_blocks;
    plan.total_query_blocks += s.num_query_blocks;
    plan.total_chunks += CeilDiv(record.scored_blocks, plan.chunk_blocks);
    plan.total_segments += segments;
    plan.total_groups += sparse ? CeilDiv(s.num_query_blocks, plan.group_blocks) : 0;
    plan.total_line_chunks +=
        plan.measures_lines() ? LineChunks(record, plan.chunk_blocks) : 0;
    const int32_t sampled =
        SampledRows(plan.problem.options.coverage_rows, record.q_len);
    plan.coverage_groups += sparse ? CeilDiv(sampled, kCoverageRowsTogether) : 0;
  }
  plan.copied_blocks =
      plan.total_key_blocks + g.num_heads / g.num_order_heads * plan.total_gathered;
}

// Single columns and distances that are chosen, and what is gathered and listed.
void PlaceKeyLines(CudaAttentionPlan& plan, WorkspaceLayout& layout) {
  if (!plan.chooses_key_lines) return;
  KeyLineRegions& at = plan.key_lines_at;
  const int64_t heads = plan.geometry.num_heads;
  const int64_t words = heads * plan.total_key_blocks * (kBlockTokens / 32);
  at.bits_bytes = 4 * words;
  at.column_bits = layout.Add<uint32_t>(words);
  at.distance_bits = layout.Add<uint32_t>(words);
  at.chosen = layout.Add<int32_t>(heads * plan.total_gathered * kBlockTokens);
  at.parts = layout.Add<uint32_t>(plan.total_entries * kGroupsOfTile);
  at.gathered = layout.Add<uint16_t>(plan.num_tiles());
  at.column_ends = layout.Add<uint16_t>(plan.num_tiles() * kGroupsOfTile);
}
void PlaceLines(CudaAttentionPlan& plan, WorkspaceLayout& layout) {
  if (!plan.measures_lines()) return;
  const AttentionGeometry& g = plan.geometry;
  const int64_t lines = int64_t{g.num_heads} * plan.total_key_blocks * kBlockTokens;
  plan.columns_at = layout.Add<float>(lines);
  plan.diagonals_at = layout.Add<float>(lines);
  plan.rest_at =
      layout.Add<float>(int64_t{g.num_heads} * plan.total_line_chunks * kProxies);
  if (plan.chooses_key_lines) {
    plan.key_lines_at.distances = layout.Add<float>(lines);
    return;
  }
  const int64_t with_grid = plan.has_grid() ? 1 : 0;
  const int64_t sequences =
      int64_t{g.num_heads} * static_cast<int64_t>(plan.sequences.size());
  plan.kept_lines_at = layout.Add<uint8_t>(2 * lines / kBlockTokens);
  plan.by_grid_at = layout.Add<int32_t>(sequences);
  plan.grid_at = layout.Add<float>(with_grid * g.total_entries);
  plan.grid_cuts_at = layout.Add<GridCut>(with_grid * sequences);
}

void PlaceCorrection(CudaAttentionPlan& plan, WorkspaceLayout& layout) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t corrected = plan.corrects ? 1 : 0;
  const int64_t read_heads = plan.permutes ? g.num_order_heads : g.num_kv_heads;
  plan.means_at = layout.Add<uint16_t>(corrected * kMeanOperands * read_heads *
                                       g.head_dim * plan.total_key_blocks);
  plan.lse_at = layout.Add<float>(corrected * g.num_heads * g.total_q);
}

void PlaceRegions(CudaAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t slots = int64_t{plan.total_key_blocks} * kBlockTokens;
  const int64_t copied = int64_t{plan.copied_blocks} * kBlockTokens;
  const int64_t order_heads = g.num_order_heads;
  const auto num_sequences = static_cast<int64_t>(plan.sequences.size());
  const int64_t scored = plan.orders ? 1 : 0;
  const int64_t moved = plan.permutes ? 1 : 0;
  const int64_t selected = plan.selects ? 1 : 0;
  const int64_t pooled = plan.pools_keys() ? 1 : 0;
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
  plan.guarded_at =
      layout.Add<int32_t>(plan.guards() ? g.num_heads * num_sequences : 0);
  plan.summary_bytes = layout.bytes() - plan.summary_at;
  plan.memory.scratch_bytes = layout.TakePart();

  plan.positions_at = layout.Add<int32_t>(moved * order_heads * copied);
  plan.memory.order_bytes = layout.TakePart();

  plan.counts_at = layout.Add<uint16_t>(selected * plan.num_tiles());
  plan.entries_at = layout.Add<uint16_t>(plan.has_lists ? plan.total_entries : 0);
  PlaceKeyLines(plan, layout);
  plan.memory.lists_bytes = layout.TakePart();

  plan.permuted_k_at = layout.Add<uint16_t>(moved * order_heads * copied * g.head_dim);
  plan.permuted_v_at = layout.Add<uint16_t>(moved * order_heads * copied * g.head_dim);
  plan.memory.packed_bytes = layout.TakePart();

  // Scores of keys for their order, then those for their lines.
  const int64_t chunk_rows = int64_t{g.num_heads} * kProxies *
                             std::max(plan.total_chunks, plan.total_line_chunks);
  const int64_t proxy_rows =
      chunk_rows > 0 ? g.num_heads * num_sequences * kProxies : 0;
  plan.chunk_max_at = layout.Add<float>(chunk_rows);
  plan.chunk_sum_at = layout.Add<float>(chunk_rows);
  plan.proxy_shift_at = layout.Add<float>(proxy_rows);
  plan.proxy_weight_at = layout.Add<float>(proxy_rows);
  plan.importance_at = layout.Add<float>(scored * order_heads * slots);
  plan.first_block_at = layout.Add<int32_t>(pooled * order_heads * num_sequences);
  plan.pooled_keys_at =
      layout.Add<float>(pooled * order_heads * g.head_dim * plan.total_key_blocks);
  const int64_t means = int64_t{plan.total_query_blocks} * g.num_heads * g.head_dim;
  plan.pooled_queries_at = layout.Add<float>(plan.pools_queries ? means : 0);
  plan.pooled_queries_bytes =
      plan.needs_pooled_queries() && !plan.pools_queries ? 4 * means : 0;
  plan.band_divisors_at = layout.Add<float>(
      plan.scorer == Scorer::kBands ? g.num_heads * num_sequences * kBands : 0);
  const int64_t split = plan.scorer == Scorer::kRows ? kMeanParts : 0;
  plan.mean_rows_at =
      layout.Add<uint16_t>(split * order_heads * g.head_dim * plan.total_key_blocks);
  plan.head_thresholds_at =
      layout.Add<float>(plan.thresholds_by_head() ? g.num_heads : 0);
  PlaceCorrection(plan, layout);
  PlaceLines(plan, layout);
  plan.memory.pooled_bytes = layout.TakePart();
  plan.workspace_bytes = layout.bytes();
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
    const int64_t bytes = ScorerSharedBytes(*plan);
    if (bytes > device.shared_bytes_max) {
      return Unimplemented("block scores of the longest sequence take " +
                           std::to_string(bytes) + " bytes of shared memory; this " +
                           "device has " + std::to_string(device.shared_bytes_max));
    }
  }
  MakeRecords(*plan);
  if (plan->chooses_key_lines && plan->copied_blocks > kListedBlocksMax) {
    return Unimplemented("vertical_tokens " +
                         std::to_string(problem.options.vertical_tokens) + " gives " +
                         std::to_string(plan->copied_blocks) + " blocks of keys and " +
                         "gathered columns per KV head; the cuda backend has at most " +
                         std::to_string(kListedBlocksMax));
  }
  PlaceRegions(*plan);
  return plan;
}

}  // namespace pbs::cuda
