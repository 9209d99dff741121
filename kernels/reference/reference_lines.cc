// Scores of the last queries' attention (flexprefill): its mass by block column and by
// block distance. A head whose mean estimate is near that attention also selects by
// block means over all its rows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "reference/reference_rules.h"
#include "reference/reference_select.h"

namespace pbs::reference {
namespace {

// Mass of each key slot, and of each distance d at index k_len - 1 - d.
struct Lines {
  std::vector<double> columns;
  std::vector<double> diagonals;
};

Lines LinesOf(const SelectingHead& head) {
  const LineMasses masses = MeasureLines(head, head.g.block_size, head.g.head_dim);
  return {masses.columns, {masses.distances.rbegin(), masses.distances.rend()}};
}

// How many blocks the largest lines fill that stay within gamma.
int32_t CountBlocks(const SelectingHead& head, std::vector<double> lines) {
  std::sort(lines.begin(), lines.end(), std::greater<>());
  double mass = 0;
  int32_t count = 0;
  for (double line : lines) {
    mass += line;
    if (mass > head.options().gamma) break;
    ++count;
  }
  const int32_t tokens = head.options().as_published ? 128 : head.g.block_size;
  return std::clamp((count + 1) / tokens + 1, 1, head.s().num_key_blocks);
}

std::vector<double> SumBlocks(const SelectingHead& head,
                              const std::vector<double>& lines) {
  std::vector<double> blocks(static_cast<size_t>(head.s().num_key_blocks));
  for (size_t x = 0; x < lines.size(); ++x) blocks[x / head.g.block_size] += lines[x];
  return blocks;
}

// Estimate of the columns' mass from the mean of the last queries.
std::vector<double> EstimateColumns(const SelectingHead& head, const Means& keys) {
  const int32_t first = head.FirstOfLastQueries();
  std::vector<double> mean(static_cast<size_t>(head.g.head_dim));
  for (int32_t position = first; position < head.s().k_len; ++position) {
    for (int32_t d = 0; d < head.g.head_dim; ++d) {
      mean[d] += head.Q(position, d) / (head.s().k_len - first);
    }
  }
  std::vector<double> estimate;
  for (const std::vector<double>& key : keys) {
    estimate.push_back(Dot(mean, key) / std::sqrt(head.g.head_dim));
  }
  Softmax(estimate);
  return estimate;
}

// Root of the Jensen-Shannon divergence, with the natural logarithm. As published, a
// block whose mass is 0 in f32 makes it NaN, which is below no tau.
double Distance(const SelectingHead& head, const std::vector<double>& a,
                const std::vector<double>& b) {
  double divergence = 0;
  for (size_t j = 0; j < a.size(); ++j) {
    for (double x : {a[j], b[j]}) {
      const bool is_zero = static_cast<float>(x) == 0;
      if (is_zero && head.options().as_published) return NAN;
      if (!is_zero) divergence += x / 2 * std::log(x / ((a[j] + b[j]) / 2));
    }
  }
  return std::sqrt(std::max(divergence, 0.0));
}

std::vector<bool> KeepLargest(const std::vector<double>& scores, int32_t count) {
  std::vector<bool> keep(scores.size());
  const std::vector<int32_t> by = ByFallingScore(scores);
  for (int32_t r = 0; r < count; ++r) keep[by[r]] = true;
  return keep;
}

// Blocks that the columns and distances keep, for all query blocks.
Kept KeepLines(const SelectingHead& head, const Lines& lines, bool only_forced) {
  const int32_t last = head.s().num_key_blocks - 1;
  std::vector<double> columns = SumBlocks(head, lines.columns);
  std::vector<double> distances = SumBlocks(head, lines.diagonals);
  constexpr double kForced = std::numeric_limits<double>::infinity();
  if (head.options().force_first_block) columns[head.FirstBlock()] = kForced;
  distances[last] = kForced;
  const int32_t num_columns = only_forced ? 1 : CountBlocks(head, lines.columns);
  const int32_t num_distances = only_forced ? 1 : CountBlocks(head, lines.diagonals);
  const std::vector<bool> keeps_column = KeepLargest(columns, num_columns);
  const std::vector<bool> keeps_distance = KeepLargest(distances, num_distances);
  Kept kept;
  for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
    kept.emplace_back();
    for (int32_t j = 0; j < head.NumCandidates(i); ++j) {
      kept.back().push_back(keeps_column[j] ||
                            keeps_distance[last - (head.Block(i) - j)]);
    }
  }
  return kept;
}

// Adds the largest probabilities of all query blocks together that stay within gamma of
// their sum.
void KeepGrid(const SelectingHead& head, const Means& keys, Kept& kept) {
  const Means queries = QueryMeans(head);
  std::vector<double> grid;
  double sum = 0;
  for (int32_t i = 0; i < head.s().num_query_blocks; ++i) {
    std::vector<double> row;
    for (int32_t j = 0; j < head.NumCandidates(i); ++j) {
      row.push_back(Dot(queries[i], keys[j]) / std::sqrt(head.g.head_dim));
    }
    if (!row.empty()) sum += 1;
    Softmax(row);
    grid.insert(grid.end(), row.begin(), row.end());
  }
  std::vector<bool> keep(grid.size());
  double mass = 0;
  for (int32_t at : ByFallingScore(grid)) {
    mass += grid[at];
    if (mass > head.options().gamma * sum) break;
    keep[at] = true;
  }
  size_t at = 0;
  for (std::vector<bool>& row : kept) {
    for (size_t j = 0; j < row.size(); ++j, ++at) row[j] = row[j] || keep[at];
  }
}

}  // namespace

LineMasses MeasureLines(const SelectingHead& head, int32_t num_queries, int32_t width) {
  const SequenceGeometry& s = head.s();
  const int32_t first = s.k_len - std::min(num_queries, s.q_len);
  LineMasses lines = {std::vector<double>(static_cast<size_t>(s.k_len)),
                      std::vector<double>(static_cast<size_t>(s.k_len))};
  for (int32_t position = first; position < s.k_len; ++position) {
    std::vector<double> row(static_cast<size_t>(s.k_len), -INFINITY);
    for (int32_t slot = 0; slot < s.k_len; ++slot) {
      if (head.order[slot] > position) continue;
      double dot = 0;
      for (int32_t d = 0; d < head.g.head_dim; ++d) {
        dot += head.Q(position, d) * head.K(slot, d);
      }
      row[slot] = dot / std::sqrt(width);
    }
    Softmax(row);
    for (int32_t slot = 0; slot < s.k_len; ++slot) {
      const double mass = row[slot] / (s.k_len - first);
      // A sorted key can lie behind its query.
      const int32_t distance = std::max(position - slot, 0);
      lines.columns[slot] += mass;
      lines.distances[distance] += mass;
    }
  }
  return lines;
}

Kept SelectByLines(const SelectingHead& head) {
  const AttentionOptions& options = head.options();
  const Lines lines = LinesOf(head);
  const Means keys = KeyMeans(head, ShortBlock::kLength);
  const double distance =
      Distance(head, EstimateColumns(head, keys), SumBlocks(head, lines.columns));
  const bool query_aware = distance < options.tau;  // false for NaN
  Kept kept = KeepLines(head, lines, query_aware);
  if (query_aware) KeepGrid(head, keys, kept);
  if (options.gamma >= 1.0f) {
    for (std::vector<bool>& row : kept) row.assign(row.size(), true);
  }
  return kept;
}

}  // namespace pbs::reference
