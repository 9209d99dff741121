// Stage 2: block means of queries, block scores, lists.
#include "cpu/attention_select.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace pbs::cpu {
namespace {

constexpr int32_t kMeansTile = 16;
constexpr int32_t kBandsTile = 16;
constexpr int32_t kWholeHead = std::numeric_limits<int32_t>::max();
// Strided query rows of an item of XAttention: enough to reuse each panel of keys.
constexpr int32_t kAntidiagonalRows = 64;

using SelectFunction = void (*)(AttentionRun&, const Unit&, const SelectItem&, int);

// What a scorer needs, and how it selects.
struct CpuScorer {
  ScorerNeeds needs;
  SelectFunction select = nullptr;
  int64_t (*words)(const CpuAttentionPlan&, const SequenceGeometry&) = nullptr;
};

CpuScorer ScorerOf(const AttentionOptions& options) {
  switch (TraitsOf(options.method).scorer) {
    case Scorer::kMeans:
      return {{.tile = kMeansTile, .key_means = true, .query_means = true},
              SelectByMeans,
              MeansWords};
    case Scorer::kBands:
      return {{.tile = kBandsTile, .key_means = true, .query_means = true},
              SelectByBands,
              BandsWords};
    case Scorer::kRows:
      return {{.key_means = true, .means_by_length = true}, SelectByRows, RowsWords};
    case Scorer::kAntidiagonal:
      return {
          {.tile = std::max(1, kAntidiagonalRows * options.stride / options.block_size),
           .folded_keys = true},
          SelectByAntidiagonals,
          AntidiagonalsWords};
    case Scorer::kLines:
      if (TraitsOf(options.method).rule == Rule::kLargestLines) {
        return {{.tile = kWholeHead}, SelectByVerticalSlash, VerticalSlashWords};
      }
      return {{.tile = kWholeHead,
               .key_means = true,
               .query_means = true,
               .means_by_length = true},
              SelectByLines,
              LinesWords};
    case Scorer::kNone:
      break;
  }
  return {};
}

void PoolQueryBlock(AttentionRun& run, const Unit& unit, int32_t member,
                    int32_t query_block, int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const RowRange range = RowsOfBlock(run, unit, query_block);
  auto* rows = static_cast<uint32_t*>(run.Scratch(worker));
  for (int32_t row = range.first; row < range.last; ++row) {
    RowToWords(run.kernels, plan.format,
               run.QueryRow(unit, run.QueryHead(unit, member), row), g.head_dim,
               rows + static_cast<int64_t>(row - range.first) * plan.depth);
  }
  MeanOfRows(run, rows, range.last - range.first, g.block_size,
             PooledQueries(run, unit, member) +
                 static_cast<int64_t>(query_block) * g.head_dim);
}

void FindFirstBlock(AttentionRun& run, const Unit& unit) {
  const int32_t* positions = run.Positions(unit);
  const int32_t* zero = std::find(positions, positions + run.Sequence(unit).k_len, 0);
  run.FirstBlock(unit) =
      static_cast<int32_t>(zero - positions) / run.plan.geometry.block_size;
}

void ClearPooledPadding(const AttentionRun& run, const Unit& unit) {
  const AttentionGeometry& g = run.plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const float zeros[kHeadDims.back()] = {};
  const auto padded = static_cast<int32_t>(RoundUp(s.num_key_blocks, kLanePad));
  for (int32_t block = s.num_key_blocks; block < padded; ++block) {
    StoreColumn(run.kernels, padded, block, g.head_dim, zeros,
                run.Pooled(unit) + run.plan.Pooled(s).keys);
  }
}

void StoreFullLists(AttentionRun& run, const Unit& unit, const SelectItem& item,
                    int worker) {
  const std::span<uint8_t> keep =
      ItemScratch(run, worker).Keep(run.Sequence(unit).num_key_blocks);
  for (int32_t i = 0; i < item.num_blocks; ++i) {
    std::fill(keep.begin(), keep.end(), uint8_t{0});
    StoreList(run, unit, item.member, item.first_block + i, keep);
  }
}

SelectItem ItemAt(const AttentionRun& run, const Unit& unit, int64_t index) {
  const int32_t blocks = run.Sequence(unit).num_query_blocks;
  const int32_t tile = run.plan.scorer.tile;
  const int64_t tiles = (int64_t{blocks} + tile - 1) / tile;
  const auto first = static_cast<int32_t>(index % tiles * tile);
  return {.member = static_cast<int32_t>(index / tiles),
          .first_block = first,
          .num_blocks = std::min(tile, blocks - first)};
}

}  // namespace

ScorerNeeds NeedsOf(const AttentionOptions& options) { return ScorerOf(options).needs; }

int64_t SelectWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  return ScorerOf(plan.problem.options).words(plan, s);
}

RowRange RowsOfBlock(const AttentionRun& run, const Unit& unit, int32_t query_block) {
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t block_size = run.plan.geometry.block_size;
  const int32_t begin = (s.first_query_block + query_block) * block_size;
  return {std::max(begin - s.query_offset, 0),
          std::min(begin + block_size - s.query_offset, s.q_len)};
}

int32_t NumCandidates(const AttentionRun& run, const Unit& unit, int32_t query_block) {
  const AttentionGeometry& g = run.plan.geometry;
  const int32_t block = run.Sequence(unit).first_query_block + query_block;
  // Without an order, the diagonal block competes for the mass.
  return Permutes(run.plan.problem.options)
             ? block / g.blocks_per_segment * g.blocks_per_segment
             : block + 1;
}

void MultiplyMeans(const AttentionRun& run, const Unit& unit, const float* queries,
                   int32_t num_rows, float* products) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const float* keys = run.Pooled(unit) + plan.Pooled(s).keys;
  run.kernels.gemm({.rows = num_rows,
                    .cols = PaddedBlocks(s),
                    .depth = plan.geometry.head_dim,
                    .a = reinterpret_cast<const uint32_t*>(queries),
                    .a_stride = plan.geometry.head_dim,
                    .b = reinterpret_cast<const uint32_t*>(keys),
                    .c = products,
                    .c_stride = PaddedBlocks(s)});
}

bool IsDenseTail(const AttentionRun& run, const Unit& unit, int32_t member,
                 int32_t query_block) {
  const AttentionOptions& options = run.plan.problem.options;
  return run.ReadsEveryBlock(unit, member) ||
         run.Sequence(unit).num_query_blocks - query_block <= options.dense_tail_blocks;
}

float* PooledQueries(const AttentionRun& run, const Unit& unit, int32_t member) {
  const SequenceGeometry& s = run.Sequence(unit);
  return run.Pooled(unit) + run.plan.Pooled(s).queries +
         static_cast<int64_t>(member) * s.num_query_blocks * run.plan.geometry.head_dim;
}

ForcedBlocks ForcedBlocksOf(const AttentionRun& run, const Unit& unit, int32_t member,
                            int32_t query_block) {
  const AttentionGeometry& g = run.plan.geometry;
  const AttentionOptions& options = run.plan.problem.options;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t block = s.first_query_block + query_block;
  const int32_t own = block / g.blocks_per_segment * g.blocks_per_segment;
  return {
      .own_begin = own,
      .own_end = g.RowCapacity(s, block),
      .first_block = ForcesFirstBlock(options) ? run.FirstBlock(unit) : -1,
      .sink_end = options.sink_blocks,
      .window_begin = IsDenseTail(run, unit, member, query_block)
                          ? 0
                          : block + 1 - options.window_blocks,
  };
}

void StoreList(AttentionRun& run, const Unit& unit, int32_t member, int32_t query_block,
               std::span<uint8_t> keep) {
  const ForcedBlocks forced = ForcedBlocksOf(run, unit, member, query_block);
  KeepForced(forced, keep);
  const int32_t head = run.QueryHead(unit, member);
  run.ListCount(unit, head, query_block) = static_cast<uint16_t>(
      WriteList(forced, keep, run.ListEntries(unit, head, query_block)));
}

double UnitCausalRatio(const AttentionRun& run, const Unit& unit) {
  const SequenceGeometry& s = run.Sequence(unit);
  int64_t executed = 0;
  int64_t causal = 0;
  for (int32_t member = 0; member < run.plan.num_members; ++member) {
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      executed += run.ListCount(unit, run.QueryHead(unit, member), i);
      causal += s.first_query_block + i + 1;
    }
  }
  return static_cast<double>(executed) / static_cast<double>(causal);
}

void SelectBlocks(AttentionRun& run, const Wave& wave) {
  const CpuAttentionPlan& plan = run.plan;
  if (wave.query_blocks.back() == 0) return;
  const auto for_each_selecting = [&](auto&& body) {
    run.pool.ParallelFor(wave.num_units, [&](int64_t i, int) {
      const Unit& unit = plan.units[wave.first_unit + i];
      if (plan.SelectsBlocks(unit)) body(unit);
    });
  };
  for_each_selecting([&](const Unit& unit) {
    FindFirstBlock(run, unit);
    if (plan.scorer.key_means) ClearPooledPadding(run, unit);
  });
  if (plan.scorer.query_means) {
    run.ForEach(wave, wave.query_blocks,
                [&](const Unit& unit, int64_t index, int worker) {
                  const int32_t blocks = run.Sequence(unit).num_query_blocks;
                  PoolQueryBlock(run, unit, static_cast<int32_t>(index / blocks),
                                 static_cast<int32_t>(index % blocks), worker);
                });
  }
  if (TraitsOf(plan.problem.options.method).scorer == Scorer::kBands) {
    for_each_selecting([&](const Unit& unit) {
      for (int32_t member = 0; member < plan.num_members; ++member) {
        MeasureBands(run, unit, member);
      }
    });
  }
  const SelectFunction select = ScorerOf(plan.problem.options).select;
  run.ForEach(
      wave, wave.select_items, [&](const Unit& unit, int64_t index, int worker) {
        if (run.non_finite) return;
        const SelectItem item = ItemAt(run, unit, index);
        // Scores change nothing where every block is read.
        if (IsDenseTail(run, unit, item.member, item.first_block) && !plan.gathers) {
          StoreFullLists(run, unit, item, worker);
        } else {
          select(run, unit, item, worker);
        }
      });
}

}  // namespace pbs::cpu
