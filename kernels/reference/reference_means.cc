// Scores of block means: of whole rows (pbs, mean_pooling), and of the slow and the
// fast rotary pairs (prism).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/reference_rules.h"
#include "reference/reference_select.h"

namespace pbs::reference {
namespace {

// Columns of the `width / 2` slowest or fastest pairs. Pair p has the columns p and
// p + head_dim / 2, and a lower p turns faster.
std::vector<int32_t> BandColumns(int32_t head_dim, int32_t width, bool fast) {
  const int32_t first = fast ? 0 : head_dim / 2 - width / 2;
  std::vector<int32_t> columns;
  for (int32_t p = first; p < first + width / 2; ++p) columns.push_back(p);
  for (int32_t p = first; p < first + width / 2; ++p) {
    columns.push_back(p + head_dim / 2);
  }
  return columns;
}

Means ColumnsOf(const Means& means, const std::vector<int32_t>& columns) {
  Means part;
  for (const std::vector<double>& mean : means) {
    part.emplace_back();
    for (int32_t column : columns) part.back().push_back(mean[column]);
  }
  return part;
}

double RootMeanSquare(const Means& means) {
  double sum = 0;
  for (const std::vector<double>& mean : means) sum += Dot(mean, mean);
  return std::sqrt(sum / static_cast<double>(means.size() * means[0].size()));
}

// Logits of a band's means are divided by the root of its width and by its temperature:
// its share of the mean squares of queries and keys.
double BandDivisor(const Means& queries, const Means& keys, const Means& band_queries,
                   const Means& band_keys) {
  const auto width = static_cast<double>(band_queries[0].size());
  const auto head_dim = static_cast<double>(queries[0].size());
  const double temperature =
      std::sqrt(width / head_dim) *
      (RootMeanSquare(band_queries) / std::max(RootMeanSquare(queries), 1e-6)) *
      (RootMeanSquare(band_keys) / std::max(RootMeanSquare(keys), 1e-6));
  return std::sqrt(width) * temperature;
}

}  // namespace

Means QueryMeans(const SelectingHead& head) {
  const SequenceGeometry& s = head.s();
  const ScoreRounding round = ScoreRounding::OfBlocks(head.problem);
  Means means(static_cast<size_t>(s.num_query_blocks),
              std::vector<double>(static_cast<size_t>(head.g.head_dim)));
  for (int32_t position = s.query_offset; position < s.k_len; ++position) {
    const int32_t i = position / head.g.block_size - s.first_query_block;
    for (int32_t d = 0; d < head.g.head_dim; ++d) {
      means[i][d] += head.Q(position, d) / head.g.block_size;
    }
  }
  for (std::vector<double>& mean : means) {
    for (double& x : mean) x = round(x);
  }
  return means;
}

Means KeyMeans(const SelectingHead& head, ShortBlock divisor) {
  const SequenceGeometry& s = head.s();
  const int32_t block_size = head.g.block_size;
  const ScoreRounding round = ScoreRounding::OfBlocks(head.problem);
  Means means;
  for (int32_t block = 0; block < s.num_key_blocks; ++block) {
    const int32_t begin = block * block_size;
    const int32_t end = std::min(begin + block_size, s.k_len);
    const int32_t count = divisor == ShortBlock::kLength ? end - begin : block_size;
    means.emplace_back(static_cast<size_t>(head.g.head_dim));
    for (int32_t slot = begin; slot < end; ++slot) {
      for (int32_t d = 0; d < head.g.head_dim; ++d) {
        means.back()[d] += head.K(slot, d) / count;
      }
    }
    for (double& x : means.back()) x = round(x);
  }
  return means;
}

Kept SelectByMeans(const SelectingHead& head) {
  const ScoreRounding round = ScoreRounding::OfBlocks(head.problem);
  const Means queries = QueryMeans(head);
  const Means keys = KeyMeans(head, ShortBlock::kBlockSize);
  Kept kept;
  for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
    std::vector<double> logits;
    for (int32_t j = 0; j < head.NumCandidates(i); ++j) {
      const double dot = Dot(queries[i], keys[j]);
      logits.push_back(round(round(dot) / std::sqrt(head.g.head_dim)));
    }
    kept.push_back(Cover(logits, head.options().threshold));
  }
  return kept;
}

Kept SelectByBands(const SelectingHead& head) {
  const AttentionOptions& options = head.options();
  const BandWidths widths = BandWidthsOf(head.problem);
  const Means queries = QueryMeans(head);
  const Means keys = KeyMeans(head, ShortBlock::kBlockSize);
  Kept kept(queries.size());
  for (bool fast : {false, true}) {
    const double threshold =
        fast && options.fast_threshold > 0 ? options.fast_threshold : options.threshold;
    const std::vector<int32_t> columns =
        BandColumns(head.g.head_dim, fast ? widths.fast : widths.slow, fast);
    const Means band_queries = ColumnsOf(queries, columns);
    const Means band_keys = ColumnsOf(keys, columns);
    const double divisor = BandDivisor(queries, keys, band_queries, band_keys);
    for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
      std::vector<double> logits;
      for (int32_t j = 0; j < head.NumCandidates(i); ++j) {
        const double dot = Dot(band_queries[i], band_keys[j]);
        logits.push_back(divisor > 0 ? dot / divisor : 0.0);  // a band of zeros
      }
      const std::vector<bool> band = Cover(logits, threshold);
      kept[i].resize(band.size());
      for (size_t j = 0; j < band.size(); ++j) kept[i][j] = kept[i][j] || band[j];
    }
  }
  return kept;
}

}  // namespace pbs::reference
