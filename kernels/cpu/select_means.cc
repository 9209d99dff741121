// Scores blocks by the products of block means: the whole mean (pbs, mean_pooling), or
// once per band of rotary pairs (prism, arXiv 2602.08426).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "common/score_rounding.h"
#include "cpu/attention_select.h"
#include "methods/block_selection.h"

namespace pbs::cpu {
namespace {

constexpr int kNumBands = 2;  // slow, fast

// Raw dot products of block means -> scaled logits.
void ScaleLogits(const AttentionRun& run, float divisor, std::span<float> logits) {
  const DType rounding = BlockScoreRoundingOf(run.plan.problem);
  VisitDType(rounding, [&](auto element) {
    using Element = decltype(element);
    const auto round = [](float x) { return ToFloat(FromFloat<Element>(x)); };
    for (float& logit : logits) logit = round(round(logit) / divisor);
  });
}

// First pair and number of pairs of a band.
struct Band {
  int32_t first_pair = 0;
  int32_t num_pairs = 0;
};

std::array<Band, kNumBands> BandsOf(const AttentionProblem& problem) {
  const int32_t pairs = problem.shape.head_dim / 2;
  const BandWidths widths = BandWidthsOf(problem);
  return {Band{pairs - widths.slow / 2, widths.slow / 2}, Band{0, widths.fast / 2}};
}

// Calls body(column) for the columns of a band: pair p has columns p and p + pairs.
template <class Body>
void ForEachColumn(const Band& band, int32_t head_dim, Body&& body) {
  for (int32_t p = band.first_pair; p < band.first_pair + band.num_pairs; ++p) {
    body(p);
    body(p + head_dim / 2);
  }
}

float* BandDivisors(const AttentionRun& run, const Unit& unit, int32_t member) {
  return run.Pooled(unit) + run.plan.Pooled(run.Sequence(unit)).bands +
         static_cast<int64_t>(member) * kNumBands;
}

using ColumnSquares = std::array<double, kHeadDims.back()>;

// Sum over all blocks of the squares of each column.
ColumnSquares SquaresOfKeys(const AttentionRun& run, const Unit& unit) {
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t head_dim = run.plan.geometry.head_dim;
  const float* panel = run.Pooled(unit) + run.plan.Pooled(s).keys;
  ColumnSquares squares{};
  for (int32_t first = 0; first < PaddedBlocks(s); first += run.kernels.panel_width) {
    const int32_t width = std::min(run.kernels.panel_width, PaddedBlocks(s) - first);
    for (int32_t d = 0; d < head_dim; ++d) {
      for (int32_t j = 0; j < width; ++j, ++panel) {
        squares[d] += static_cast<double>(*panel) * *panel;
      }
    }
  }
  return squares;
}

ColumnSquares SquaresOfQueries(const AttentionRun& run, const Unit& unit,
                               int32_t member) {
  const int32_t head_dim = run.plan.geometry.head_dim;
  const float* mean = PooledQueries(run, unit, member);
  ColumnSquares squares{};
  for (int32_t i = 0; i < run.Sequence(unit).num_query_blocks; ++i) {
    for (int32_t d = 0; d < head_dim; ++d, ++mean) {
      squares[d] += static_cast<double>(*mean) * *mean;
    }
  }
  return squares;
}

// Root mean square of the columns of a band, over that of all columns.
double BandShare(const ColumnSquares& squares, const Band& band, int32_t num_blocks,
                 int32_t head_dim) {
  double whole = 0;
  for (int32_t d = 0; d < head_dim; ++d) whole += squares[d];
  double part = 0;
  ForEachColumn(band, head_dim, [&](int32_t d) { part += squares[d]; });
  const double blocks = num_blocks;
  const double root = std::sqrt(whole / (blocks * head_dim));
  return std::sqrt(part / (blocks * 2 * band.num_pairs)) / std::max(root, 1e-6);
}

}  // namespace

int64_t MeansWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  const int64_t padded = PaddedBlocks(s);
  return padded * plan.scorer.tile + 2 * RoundUp(s.num_key_blocks, kLanePad) +
         RoundUp(s.num_key_blocks / 4 + 1, kLanePad);
}

void SelectByMeans(AttentionRun& run, const Unit& unit, const SelectItem& item,
                   int worker) {
  const AttentionGeometry& g = run.plan.geometry;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t padded = PaddedBlocks(s);
  ItemScratch scratch(run, worker);
  float* logits = scratch.Floats(int64_t{padded} * run.plan.scorer.tile);
  const std::span<uint64_t> sort_keys = scratch.SortKeys(s.num_key_blocks);
  const std::span<uint8_t> keep = scratch.Keep(s.num_key_blocks);
  const float* queries = PooledQueries(run, unit, item.member) +
                         static_cast<int64_t>(item.first_block) * g.head_dim;
  MultiplyMeans(run, unit, queries, item.num_blocks, logits);
  const float root = std::sqrt(static_cast<float>(g.head_dim));
  const float threshold = run.Threshold(unit, item.member);
  for (int32_t i = 0; i < item.num_blocks; ++i) {
    const int32_t query_block = item.first_block + i;
    const std::span<float> row(
        logits + static_cast<int64_t>(i) * padded,
        static_cast<size_t>(NumCandidates(run, unit, query_block)));
    ScaleLogits(run, root, row);
    std::fill(keep.begin(), keep.end(), uint8_t{0});
    if (!KeepCover(threshold, row, sort_keys, keep)) {
      run.non_finite = true;
      return;
    }
    StoreList(run, unit, item.member, query_block, keep);
  }
}

int64_t BandsWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  const int64_t queries = int64_t{plan.scorer.tile} * plan.geometry.head_dim;
  return MeansWords(plan, s) + PaddedBlocks(s) * plan.scorer.tile + queries;
}

void MeasureBands(AttentionRun& run, const Unit& unit, int32_t member) {
  const int32_t head_dim = run.plan.geometry.head_dim;
  const SequenceGeometry& s = run.Sequence(unit);
  const ColumnSquares keys = SquaresOfKeys(run, unit);
  const ColumnSquares queries = SquaresOfQueries(run, unit, member);
  const auto bands = BandsOf(run.plan.problem);
  for (int band = 0; band < kNumBands; ++band) {
    const double width = 2 * bands[band].num_pairs;
    const double temperature =
        std::sqrt(width / head_dim) *
        BandShare(queries, bands[band], s.num_query_blocks, head_dim) *
        BandShare(keys, bands[band], s.num_key_blocks, head_dim);
    // A band of zeros has logits of 0, not 0 / 0.
    BandDivisors(run, unit, member)[band] =
        static_cast<float>(std::max(std::sqrt(width) * temperature, 1e-30));
  }
}

void SelectByBands(AttentionRun& run, const Unit& unit, const SelectItem& item,
                   int worker) {
  const AttentionProblem& problem = run.plan.problem;
  const int32_t head_dim = run.plan.geometry.head_dim;
  const SequenceGeometry& s = run.Sequence(unit);
  const int32_t padded = PaddedBlocks(s);
  const int64_t tile = run.plan.scorer.tile;
  ItemScratch scratch(run, worker);
  float* masked = scratch.Floats(tile * head_dim);
  float* logits = scratch.Floats(kNumBands * tile * padded);
  const std::span<uint64_t> sort_keys = scratch.SortKeys(s.num_key_blocks);
  const std::span<uint8_t> keep = scratch.Keep(s.num_key_blocks);
  const float* queries = PooledQueries(run, unit, item.member) +
                         static_cast<int64_t>(item.first_block) * head_dim;
  const auto bands = BandsOf(problem);
  for (int band = 0; band < kNumBands; ++band) {
    std::fill_n(masked, item.num_blocks * head_dim, 0.0f);
    for (int32_t i = 0; i < item.num_blocks; ++i) {
      ForEachColumn(bands[band], head_dim, [&](int32_t d) {
        masked[i * head_dim + d] = queries[i * head_dim + d];
      });
    }
    MultiplyMeans(run, unit, masked, item.num_blocks, logits + band * tile * padded);
  }
  const float threshold = run.Threshold(unit, item.member);
  const float of_fast = problem.options.fast_threshold;
  const float thresholds[kNumBands] = {threshold, of_fast > 0 ? of_fast : threshold};
  for (int32_t i = 0; i < item.num_blocks; ++i) {
    const int32_t query_block = item.first_block + i;
    std::fill(keep.begin(), keep.end(), uint8_t{0});
    for (int band = 0; band < kNumBands; ++band) {
      const std::span<float> row(
          logits + (band * tile + i) * padded,
          static_cast<size_t>(NumCandidates(run, unit, query_block)));
      ScaleLogits(run, BandDivisors(run, unit, item.member)[band], row);
      if (!KeepCover(thresholds[band], row, sort_keys, keep)) {
        run.non_finite = true;
        return;
      }
    }
    StoreList(run, unit, item.member, query_block, keep);
  }
}

}  // namespace pbs::cpu
