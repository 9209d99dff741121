#include "cpu/attention_plan.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/attention_select.h"
#include "cpu/row_keys.h"

namespace pbs::cpu {
namespace {

int64_t CeilDiv(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

void MakeUnits(CpuAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    if (s.q_len == 0) continue;
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      plan.units.push_back({.sequence = n, .order_head = head, .sparse = !s.dense});
    }
  }
}

void ExtendPrefixes(const CpuAttentionPlan& plan, const Unit& unit, Wave& wave) {
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = g.sequences[unit.sequence];
  const auto extend = [](std::vector<int64_t>& prefix, int64_t count) {
    if (prefix.empty()) prefix.push_back(0);
    prefix.push_back(prefix.back() + count);
  };
  const bool scored = plan.ComputesOrder(unit);
  const bool selected = plan.SelectsBlocks(unit);
  const int64_t body = plan.Body(s);
  const int64_t blocks = static_cast<int64_t>(s.num_query_blocks) * plan.num_members;
  extend(wave.key_tiles, scored ? CeilDiv(body, kKeyTile) : 0);
  extend(wave.segments, scored ? body / g.segment_size + 1 : 0);
  extend(wave.key_blocks, s.num_key_blocks);
  extend(wave.mean_blocks, plan.corrects && unit.sparse ? plan.MeanBlocks(s) : 0);
  extend(wave.query_blocks, selected ? blocks : 0);
  extend(
      wave.select_items,
      selected ? CeilDiv(s.num_query_blocks, plan.scorer.tile) * plan.num_members : 0);
  extend(wave.query_tiles, static_cast<int64_t>(s.num_query_blocks) * plan.tile_groups *
                               plan.tiles_per_block);
  ++wave.num_units;
}

struct WaveSizes {
  int64_t packed_words = 0;
  int64_t scoring = 0;
  int64_t pooled = 0;
  int64_t means = 0;

  void KeepMax(const WaveSizes& other) {
    packed_words = std::max(packed_words, other.packed_words);
    scoring = std::max(scoring, other.scoring);
    pooled = std::max(pooled, other.pooled);
    means = std::max(means, other.means);
  }
};

// Packs units into waves and places each inside its wave's regions.
WaveSizes MakeWaves(CpuAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  WaveSizes largest;
  WaveSizes current;
  for (int32_t i = 0; i < static_cast<int32_t>(plan.units.size()); ++i) {
    Unit& unit = plan.units[i];
    const SequenceGeometry& s = g.sequences[unit.sequence];
    int64_t words = 2 * plan.PackedWords(s);
    if (plan.ComputesOrder(unit)) {
      // The scores of one query head's proxies lie where the packed operands will.
      words = std::max(words, static_cast<int64_t>(plan.Body(s)) *
                                  RoundUp(plan.NumProxies(s), kLanePad));
    }
    const bool fits = (current.packed_words + words) * 4 <= kWaveBytes;
    if (plan.waves.empty() || !fits) {
      plan.waves.emplace_back().first_unit = i;
      largest.KeepMax(current);
      current = {};
    }
    unit.packed_begin = current.packed_words;
    unit.score_begin = current.scoring;
    unit.pooled_begin = current.pooled;
    unit.means_begin = current.means;
    current.packed_words += RoundUp(words, kLanePad);
    if (plan.ComputesOrder(unit)) current.scoring += plan.Scoring(s).size;
    if (plan.SelectsBlocks(unit)) current.pooled += plan.Pooled(s).size;
    if (plan.corrects && unit.sparse) current.means += plan.MeansWords(s);
    ExtendPrefixes(plan, unit, plan.waves.back());
  }
  largest.KeepMax(current);
  return largest;
}

// Per worker: rows on their way into operands, one query tile's state, one score tile.
int64_t ScratchBytes(const CpuAttentionPlan& plan) {
  const AttentionGeometry& g = plan.geometry;
  const int64_t tiles = std::min(plan.num_members, kSharedTiles);
  int64_t extra = 0;
  int64_t attend = plan.query_tile * (g.block_size + g.block_size / 2) +
                   tiles * plan.query_tile * (plan.depth + g.head_dim) +
                   tiles * 2 * RoundUp(plan.query_tile, kLanePad);
  for (const SequenceGeometry& s : g.sequences) {
    int64_t more = plan.corrects ? int64_t{plan.MeanBlocks(s)} * g.block_size : 0;
    if (plan.gathers) more += RowKeys::Words(plan, s);
    extra = std::max(extra, more);
  }
  attend += extra;
  const int64_t gather =
      static_cast<int64_t>(std::max(g.block_size, kKeyTile)) * g.head_dim + g.head_dim;
  int64_t score = 0;
  bool computes_order = false;
  for (const Unit& unit : plan.units) {
    computes_order |= plan.ComputesOrder(unit);
    if (!plan.SelectsBlocks(unit)) continue;
    score = std::max(score, SelectWords(plan, g.sequences[unit.sequence]));
  }
  const int64_t sort = computes_order ? 2 * g.segment_size : 0;
  int64_t coverage = 0;
  if (plan.problem.options.coverage_rows > 0) {
    for (const SequenceGeometry& s : g.sequences) {
      coverage = std::max(
          coverage, static_cast<int64_t>(s.num_key_blocks) * g.block_size + plan.depth +
                        (plan.gathers ? RowKeys::SlotWords(s) : 0));
    }
  }
  return RoundUp(4 * std::max({attend, gather, score, sort, coverage}), 64);
}

void PlaceRegions(CpuAttentionPlan& plan, const WaveSizes& wave) {
  const AttentionGeometry& g = plan.geometry;
  const bool sparse = std::any_of(plan.units.begin(), plan.units.end(),
                                  [](const Unit& unit) { return unit.sparse; });
  WorkspaceLayout layout;
  const int64_t key_blocks = g.total_slots / g.block_size;
  const auto num_units = static_cast<int64_t>(plan.units.size());
  plan.positions_at = layout.Add<int32_t>(g.num_order_heads * g.total_slots);
  plan.block_range_at = layout.Add<int32_t>(2 * g.num_order_heads * key_blocks);
  plan.first_block_at = layout.Add<int32_t>(num_units);
  plan.unit_dense_at = layout.Add<uint8_t>(num_units);
  plan.guarded_at =
      layout.Add<uint8_t>(plan.problem.options.coverage_min > 0
                              ? g.num_heads * static_cast<int64_t>(g.sequences.size())
                              : 0);
  plan.memory.order_bytes = layout.TakePart();

  plan.counts_at =
      layout.Add<uint16_t>(sparse ? g.num_heads * g.total_query_blocks : 0);
  plan.entries_at = layout.Add<uint16_t>(sparse ? g.total_entries : 0);
  int64_t lines = 0;
  for (Unit& unit : plan.units) {
    unit.lines_begin = lines;
    lines += plan.LinesOf(unit);
  }
  plan.lines_at = layout.Add<int32_t>(lines);
  plan.memory.lists_bytes = layout.TakePart();

  plan.packed_at = layout.Add<float>(wave.packed_words);
  plan.memory.packed_bytes = layout.TakePart();

  plan.scoring_at = layout.Add<float>(wave.scoring);
  plan.pooled_at = layout.Add<float>(wave.pooled);
  plan.means_at = layout.Add<float>(wave.means);
  plan.memory.pooled_bytes = layout.TakePart();

  plan.coverage_at = layout.Add<double>(g.num_heads * plan.sampled_before.back());
  plan.times_at = layout.Add<double>(3);
  plan.scratch_bytes = ScratchBytes(plan);
  plan.scratch_at = layout.AddBytes(plan.scratch_bytes * plan.num_workers);
  plan.memory.scratch_bytes = layout.TakePart();
  plan.workspace_bytes = layout.bytes();
}

}  // namespace

ScoringLayout CpuAttentionPlan::Scoring(const SequenceGeometry& s) const {
  const int64_t proxies = RoundUp(NumProxies(s), kLanePad);
  const int64_t tiles = CeilDiv(Body(s), kKeyTile);
  ScoringLayout layout;
  layout.importance = layout.proxies + proxies * depth;
  layout.tile_max = RoundUp(layout.importance + Body(s), kLanePad);
  layout.tile_sum = layout.tile_max + tiles * proxies;
  layout.size = layout.tile_sum + tiles * proxies;
  return layout;
}

PooledLayout CpuAttentionPlan::Pooled(const SequenceGeometry& s) const {
  PooledLayout layout;
  const int64_t means = RoundUp(s.num_key_blocks, kLanePad) * geometry.head_dim;
  layout.queries = layout.keys + (scorer.key_means ? means : 0);
  const int64_t query_means =
      static_cast<int64_t>(num_members) * s.num_query_blocks * geometry.head_dim;
  layout.bands = layout.queries + (scorer.query_means ? query_means : 0);
  layout.folded = RoundUp(layout.bands + 2 * num_members, kLanePad);
  const int64_t folded = FoldedColumns(s) * problem.options.stride * geometry.head_dim;
  layout.columns = RoundUp(layout.folded + (scorer.folded_keys ? folded : 0), kLanePad);
  const int64_t gathered =
      int64_t{2} * num_members * GatheredBlocks(s) * geometry.block_size * depth;
  layout.size = layout.columns + (gathers ? gathered : 0);
  return layout;
}

std::unique_ptr<CpuAttentionPlan> MakeCpuPlan(const AttentionProblem& problem,
                                              OperandFormat format, int num_workers) {
  auto plan = std::make_unique<CpuAttentionPlan>();
  plan->problem = problem;
  plan->geometry = MakeGeometry(problem);
  const AttentionGeometry& g = plan->geometry;
  plan->format = format;
  plan->depth = format.Words(g.head_dim);
  plan->num_members = g.num_heads / g.num_order_heads;
  plan->query_tile = std::min(g.block_size, kQueryTile);
  plan->tiles_per_block = g.block_size / plan->query_tile;
  plan->tile_groups = static_cast<int32_t>(CeilDiv(plan->num_members, kSharedTiles));
  plan->scorer = NeedsOf(problem.options);
  plan->gathers = TraitsOf(problem.options.method).rule == Rule::kLargestLines &&
                  !problem.options.use_given_lists;
  if (plan->gathers) {
    plan->query_tile = std::min(plan->query_tile, kRowGroup);
    plan->tiles_per_block = g.block_size / plan->query_tile;
  }
  plan->corrects = problem.options.mean_correction;
  plan->num_workers = num_workers;
  plan->sampled_before.push_back(0);
  for (const SequenceGeometry& s : g.sequences) {
    plan->sampled_before.push_back(plan->sampled_before.back() +
                                   std::min(problem.options.coverage_rows, s.q_len));
    int64_t entries = 0;
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      plan->row_entries.push_back(entries);
      entries += g.RowCapacity(s, s.first_query_block + i);
    }
  }
  MakeUnits(*plan);
  PlaceRegions(*plan, MakeWaves(*plan));
  return plan;
}

}  // namespace pbs::cpu
