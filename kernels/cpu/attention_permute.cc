// Stage 1: importance of keys, order inside segments, packed operands.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "common/score_rounding.h"
#include "cpu/attention_run.h"
#include "methods/key_order.h"

namespace pbs::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// The unit's part of the scoring region.
struct Scores {
  Scores(const AttentionRun& run, const Unit& unit)
      : layout(run.plan.Scoring(run.Sequence(unit))),
        num_proxies(run.plan.NumProxies(run.Sequence(unit))),
        padded(static_cast<int32_t>(RoundUp(num_proxies, kLanePad))),
        body(run.plan.Body(run.Sequence(unit))),
        num_tiles((body + kKeyTile - 1) / kKeyTile),
        base(run.Scoring(unit)) {}

  uint32_t* proxies() const {
    return reinterpret_cast<uint32_t*>(base + layout.proxies);
  }
  float* importance() const { return base + layout.importance; }
  float* tile_max(int64_t tile) const { return base + layout.tile_max + tile * padded; }
  float* tile_sum(int64_t tile) const { return base + layout.tile_sum + tile * padded; }

  ScoringLayout layout;
  int32_t num_proxies;
  int32_t padded;
  int32_t body;
  int32_t num_tiles;
  float* base;
};

// The scores [body, proxies] of one query head lie where the packed operands will.
float* ScoreTile(const AttentionRun& run, const Unit& unit, const Scores& scores,
                 int64_t tile) {
  return reinterpret_cast<float*>(run.PackedKeys(unit)) +
         tile * kKeyTile * scores.padded;
}

// The last block of queries of one query head, as columns.
void PackProxies(const AttentionRun& run, const Unit& unit, int32_t member,
                 int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const Scores scores(run, unit);
  auto* rows = static_cast<uint32_t*>(run.Scratch(worker));
  std::fill_n(rows, static_cast<int64_t>(scores.padded) * plan.depth, 0u);
  for (int32_t i = 0; i < scores.num_proxies; ++i) {
    const int32_t row = s.q_len - scores.num_proxies + i;
    RowToWords(run.kernels, plan.format,
               run.QueryRow(unit, run.QueryHead(unit, member), row),
               plan.geometry.head_dim, rows + static_cast<int64_t>(i) * plan.depth);
  }
  PackTransposed(run.kernels, rows, scores.padded, plan.depth, scores.proxies());
}

const GemmFunction& GemmOf(const AttentionRun& run) {
  return run.plan.format.pairs ? run.kernels.gemm_pairs : run.kernels.gemm;
}

ProxyRounding ProxyRoundingTo(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ProxyRounding::kNone;
    case DType::kF16:
      return ProxyRounding::kF16;
    case DType::kBF16:
      return ProxyRounding::kBf16;
  }
  return ProxyRounding::kNone;
}

// Exponentiated scores of one tile of keys, relative to the tile's own maxima.
void ScoreKeyTile(AttentionRun& run, const Unit& unit, int64_t tile, int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const Scores scores(run, unit);
  const auto first = static_cast<int32_t>(tile * kKeyTile);
  const int32_t keys = std::min(kKeyTile, scores.body - first);
  auto* rows = static_cast<uint32_t*>(run.Scratch(worker));
  for (int32_t i = 0; i < keys; ++i) {
    RowToWords(run.kernels, plan.format,
               run.Row(run.tensors.k, unit, s.k_begin, run.KvHead(unit), first + i),
               plan.geometry.head_dim, rows + static_cast<int64_t>(i) * plan.depth);
  }
  float* out = ScoreTile(run, unit, scores, tile);
  GemmOf(run)({.rows = keys,
               .cols = scores.padded,
               .depth = plan.depth,
               .a = rows,
               .a_stride = plan.depth,
               .b = scores.proxies(),
               .c = out,
               .c_stride = scores.padded});
  const float root = std::sqrt(static_cast<float>(plan.geometry.head_dim));
  run.kernels.proxy_softmax({.keys = keys,
                             .proxies = scores.padded,
                             .scale = kLog2E / root,
                             .rounding = ProxyRoundingTo(ScoreRoundingOf(plan.problem)),
                             .sqrt_head_dim = root,
                             .scores = out,
                             .tile_max = scores.tile_max(tile),
                             .tile_sum = scores.tile_sum(tile)});
}

// Turns tile maxima and sums into the weight of each tile's scores: the mean over all
// proxies and members of softmax is then a weighted sum of them.
void WeighTiles(AttentionRun& run, const Unit& unit) {
  const Scores scores(run, unit);
  for (int32_t p = 0; p < scores.padded; ++p) {
    float top = -INFINITY;
    for (int64_t t = 0; t < scores.num_tiles; ++t) {
      top = std::max(top, scores.tile_max(t)[p]);
    }
    double sum = 0;
    for (int64_t t = 0; t < scores.num_tiles; ++t) {
      sum += scores.tile_sum(t)[p] * std::exp2(scores.tile_max(t)[p] - top);
    }
    // Not negated: NaN must land here too.
    if (!(std::isfinite(top) && std::isfinite(sum))) run.non_finite = true;
    const bool counts = p < scores.num_proxies;
    const double share =
        counts ? 1.0 / (sum * scores.num_proxies * run.plan.num_members) : 0.0;
    for (int64_t t = 0; t < scores.num_tiles; ++t) {
      scores.tile_sum(t)[p] =
          static_cast<float>(share * std::exp2(scores.tile_max(t)[p] - top));
    }
  }
}

void AddImportance(AttentionRun& run, const Unit& unit, int64_t tile) {
  const Scores scores(run, unit);
  const auto first = static_cast<int32_t>(tile * kKeyTile);
  run.kernels.weighted_sums(std::min(kKeyTile, scores.body - first), scores.padded,
                            ScoreTile(run, unit, scores, tile), scores.tile_sum(tile),
                            scores.importance() + first);
}

// Sorts one whole segment, or fills in the tail behind the last one.
void SortSegment(AttentionRun& run, const Unit& unit, int64_t segment, int worker) {
  const AttentionGeometry& g = run.plan.geometry;
  const Scores scores(run, unit);
  const auto begin = static_cast<int32_t>(segment * g.segment_size);
  int32_t* positions = run.Positions(unit);
  if (begin >= scores.body) {
    std::iota(positions + begin, positions + run.Sequence(unit).k_len, begin);
    return;
  }
  std::span<int32_t> order(positions + begin, static_cast<size_t>(g.segment_size));
  SortSegments({scores.importance() + begin, static_cast<size_t>(g.segment_size)},
               g.segment_size,
               {static_cast<uint64_t*>(run.Scratch(worker)),
                static_cast<size_t>(g.segment_size)},
               order);
  for (int32_t& position : order) position += begin;
}

void FillPositions(AttentionRun& run, const Unit& unit) {
  const SequenceGeometry& s = run.Sequence(unit);
  int32_t* positions = run.Positions(unit);
  const bool identity =
      !unit.sparse || run.RanDense(unit) != 0 || !Permutes(run.plan.problem.options);
  if (identity) {
    std::iota(positions, positions + s.k_len, 0);
  } else if (run.plan.problem.options.use_given_order) {
    const RowLayout& layout = run.tensors.order.layout;
    const auto* given = static_cast<const int32_t*>(run.tensors.order.data);
    for (int32_t slot = 0; slot < s.k_len; ++slot) {
      positions[slot] =
          given[layout.Offset(unit.sequence, s.k_begin, unit.order_head, slot)];
    }
  }
  std::fill(
      positions + s.k_len,
      positions + static_cast<int64_t>(s.num_key_blocks) * run.plan.geometry.block_size,
      INT32_MAX);
}

// Rows of one block of keys or values, in slot order; padding becomes zeros.
void GatherBlock(const AttentionRun& run, const Unit& unit, const ConstRows& source,
                 int32_t block, uint32_t* rows) {
  const CpuAttentionPlan& plan = run.plan;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t block_size = plan.geometry.block_size;
  const int32_t* positions =
      run.Positions(unit) + static_cast<int64_t>(block) * block_size;
  const int32_t keys = std::min(block_size, s.k_len - block * block_size);
  for (int32_t i = 0; i < keys; ++i) {
    RowToWords(run.kernels, plan.format,
               run.Row(source, unit, s.k_begin, run.KvHead(unit), positions[i]),
               plan.geometry.head_dim, rows + static_cast<int64_t>(i) * plan.depth);
  }
  std::fill(rows + static_cast<int64_t>(keys) * plan.depth, rows + run.BlockWords(),
            0u);
}

// Mean of a gathered block into its column of the packed block means.
void PoolKeys(const AttentionRun& run, const Unit& unit, int32_t block,
              const uint32_t* rows, float* mean) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t keys = std::min(g.block_size, s.k_len - block * g.block_size);
  MeanOfRows(run, rows, keys, plan.scorer.means_by_length ? keys : g.block_size, mean);
  StoreColumn(run.kernels, static_cast<int32_t>(RoundUp(s.num_key_blocks, kLanePad)),
              block, g.head_dim, mean, run.Pooled(unit) + plan.Pooled(s).keys);
}

// The strided keys of a gathered block: column j has `stride` keys, one after the
// other.
void FoldKeys(const AttentionRun& run, const Unit& unit, int32_t block,
              const uint32_t* rows, float* wide) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t stride = plan.problem.options.stride;
  const auto columns = static_cast<int32_t>(plan.FoldedColumns(s));
  float* folded = run.Pooled(unit) + plan.Pooled(s).folded;
  for (int32_t i = 0; i < g.block_size; ++i) {
    const uint32_t* row = rows + static_cast<int64_t>(i) * plan.depth;
    if (plan.format.pairs) {
      run.kernels.bf16_to_f32(reinterpret_cast<const uint16_t*>(row), wide, g.head_dim);
    } else {
      std::copy_n(reinterpret_cast<const float*>(row), g.head_dim, wide);
    }
    StoreColumnPart(run.kernels, {.cols = columns, .depth = stride * g.head_dim},
                    (block * g.block_size + i) / stride, i % stride * g.head_dim,
                    {wide, static_cast<size_t>(g.head_dim)}, folded);
  }
}

// Mean rows of the key blocks that fill one block, as words; padding becomes zeros.
void LoadMeans(const AttentionRun& run, const Unit& unit, int32_t mean_block,
               const float* means, uint32_t* rows) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  const int32_t first = mean_block * g.block_size;
  for (int32_t i = 0; i < g.block_size; ++i) {
    uint32_t* row = rows + static_cast<int64_t>(i) * plan.depth;
    const float* mean = means + static_cast<int64_t>(first + i) * g.head_dim;
    if (first + i >= run.Sequence(unit).num_key_blocks) {
      std::fill_n(row, plan.depth, 0u);
    } else if (plan.format.pairs) {
      run.kernels.f32_to_bf16(mean, reinterpret_cast<uint16_t*>(row), g.head_dim);
    } else {
      std::copy_n(mean, g.head_dim, reinterpret_cast<float*>(row));
    }
  }
}

void PackBlock(AttentionRun& run, const Unit& unit, int32_t block, int worker) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  auto* rows = static_cast<uint32_t*>(run.Scratch(worker));
  GatherBlock(run, unit, run.tensors.k, block, rows);
  if (plan.SelectsBlocks(unit) && run.RanDense(unit) == 0) {
    auto* row = reinterpret_cast<float*>(rows + run.BlockWords());
    if (plan.scorer.key_means) PoolKeys(run, unit, block, rows, row);
    if (plan.scorer.folded_keys) FoldKeys(run, unit, block, rows, row);
  }
  const int32_t keys =
      std::min(g.block_size, run.Sequence(unit).k_len - block * g.block_size);
  const bool keeps_means = plan.corrects && unit.sparse;
  const int64_t mean_at = static_cast<int64_t>(block) * g.head_dim;
  if (keeps_means) MeanOfRows(run, rows, keys, keys, run.MeanKeyRows(unit) + mean_at);
  PackTransposed(run.kernels, rows, g.block_size, plan.depth,
                 run.PackedKeys(unit) + block * run.BlockWords());

  GatherBlock(run, unit, run.tensors.v, block, rows);
  if (keeps_means) MeanOfRows(run, rows, keys, keys, run.MeanValueRows(unit) + mean_at);
  PackValues(run, rows, run.PackedValues(unit) + block * run.BlockWords());

  const int32_t* positions =
      run.Positions(unit) + static_cast<int64_t>(block) * g.block_size;
  const auto [least, largest] = std::minmax_element(positions, positions + keys);
  run.BlockRange(unit)[2 * block] = *least;
  run.BlockRange(unit)[2 * block + 1] = *largest;
}

}  // namespace

void PackValues(const AttentionRun& run, const uint32_t* rows, uint32_t* values) {
  const AttentionGeometry& g = run.plan.geometry;
  if (run.plan.format.pairs) {
    PackRowsAsPairs(run.kernels, rows, g.block_size, g.head_dim, values);
  } else {
    PackRows(run.kernels, rows, g.block_size, g.head_dim, values);
  }
}

void MeanOfRows(const AttentionRun& run, const uint32_t* rows, int32_t num_rows,
                int32_t divisor, float* mean) {
  const CpuAttentionPlan& plan = run.plan;
  const AttentionGeometry& g = plan.geometry;
  float wide[kHeadDims.back()];
  std::fill_n(mean, g.head_dim, 0.0f);
  for (int32_t i = 0; i < num_rows; ++i) {
    const uint32_t* row = rows + static_cast<int64_t>(i) * plan.depth;
    if (plan.format.pairs) {
      run.kernels.bf16_to_f32(reinterpret_cast<const uint16_t*>(row), wide, g.head_dim);
      run.kernels.add(wide, mean, g.head_dim);
    } else {
      run.kernels.add(reinterpret_cast<const float*>(row), mean, g.head_dim);
    }
  }
  run.kernels.divide(static_cast<float>(divisor), mean, g.head_dim);
  if (BlockScoreRoundingOf(plan.problem) != DType::kF32) {
    uint16_t narrow[kHeadDims.back()];
    RowFromF32(run.kernels, plan.problem.dtype, mean, g.head_dim, narrow);
    RowToF32(run.kernels, plan.problem.dtype, narrow, g.head_dim, mean);
  }
}

void ScoreAndSortKeys(AttentionRun& run, const Wave& wave) {
  const CpuAttentionPlan& plan = run.plan;
  const auto for_each_scored = [&](auto&& body) {
    run.pool.ParallelFor(wave.num_units, [&](int64_t i, int worker) {
      const Unit& unit = plan.units[wave.first_unit + i];
      if (plan.ComputesOrder(unit)) body(unit, worker);
    });
  };
  if (wave.key_tiles.back() > 0) {
    for_each_scored([&](const Unit& unit, int) {
      const Scores scores(run, unit);
      std::fill_n(scores.importance(), scores.body, 0.0f);
    });
    for (int32_t member = 0; member < plan.num_members && !run.Stopped(); ++member) {
      for_each_scored([&](const Unit& unit, int worker) {
        PackProxies(run, unit, member, worker);
      });
      run.ForEach(wave, wave.key_tiles,
                  [&](const Unit& unit, int64_t tile, int worker) {
                    ScoreKeyTile(run, unit, tile, worker);
                  });
      for_each_scored([&](const Unit& unit, int) { WeighTiles(run, unit); });
      run.ForEach(wave, wave.key_tiles, [&](const Unit& unit, int64_t tile, int) {
        AddImportance(run, unit, tile);
      });
    }
    if (run.non_finite) return;
  }
  run.ForEach(wave, wave.segments, [&](const Unit& unit, int64_t segment, int worker) {
    SortSegment(run, unit, segment, worker);
  });
  run.pool.ParallelFor(wave.num_units, [&](int64_t i, int) {
    FillPositions(run, plan.units[wave.first_unit + i]);
  });
}

void PackOperands(AttentionRun& run, const Wave& wave) {
  run.ForEach(wave, wave.key_blocks, [&](const Unit& unit, int64_t block, int worker) {
    PackBlock(run, unit, static_cast<int32_t>(block), worker);
  });
}

void PackMeans(AttentionRun& run, const Wave& wave) {
  run.ForEach(wave, wave.mean_blocks, [&](const Unit& unit, int64_t index, int worker) {
    const CpuAttentionPlan& plan = run.plan;
    const auto block = static_cast<int32_t>(index);
    auto* rows = static_cast<uint32_t*>(run.Scratch(worker));
    LoadMeans(run, unit, block, run.MeanKeyRows(unit), rows);
    PackTransposed(run.kernels, rows, plan.geometry.block_size, plan.depth,
                   run.MeanKeys(unit) + block * run.BlockWords());
    LoadMeans(run, unit, block, run.MeanValueRows(unit), rows);
    PackValues(run, rows, run.MeanValues(unit) + block * run.BlockWords());
  });
}

void FallBackToDense(AttentionRun& run, const Wave& wave) {
  if (!run.plan.problem.options.dense_fallback || wave.query_blocks.back() == 0) return;
  run.pool.ParallelFor(wave.num_units, [&](int64_t i, int) {
    const Unit& unit = run.plan.units[wave.first_unit + i];
    if (!run.plan.SelectsBlocks(unit)) return;
    if (UnitCausalRatio(run, unit) < kDenseFallbackRatio) return;
    run.RanDense(unit) = 1;
    FillPositions(run, unit);
  });
  run.ForEach(wave, wave.key_blocks, [&](const Unit& unit, int64_t block, int worker) {
    if (run.RanDense(unit) != 0)
      PackBlock(run, unit, static_cast<int32_t>(block), worker);
  });
}

}  // namespace pbs::cpu
