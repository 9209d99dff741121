// Selects by the attention of a sequence's last queries: the mass of key blocks
// (columns) and of block distances (diagonals). A head whose pooled estimate is near
// that attention selects by block means over all its rows instead (flexprefill, arXiv
// 2502.20766).
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <span>

#include "cpu/line_masses.h"

namespace pbs::cpu {
namespace {

constexpr int32_t kMeansTile = 16;  // query blocks scored together
constexpr int kDigitBits = 8;       // of the search for the smallest kept probability
constexpr int kDigits = 32 / kDigitBits;
constexpr int32_t kDigitValues = 1 << kDigitBits;

// The item's memory.
struct Lines {
  Lines(const AttentionRun& run, const Unit& unit, ItemScratch scratch)
      : s(run.Sequence(unit)),
        block_size(run.plan.geometry.block_size),
        masses(run, unit, block_size, scratch),
        sorted(scratch.Floats(int64_t{s.num_key_blocks} * block_size)),
        column_blocks(scratch.Floats(s.num_key_blocks)),
        diagonal_blocks(scratch.Floats(s.num_key_blocks)),
        estimate(scratch.Floats(s.num_key_blocks)),
        logits(scratch.Floats(int64_t{kMeansTile} * PaddedBlocks(s))),
        keeps_column(scratch.Keep(s.num_key_blocks)),
        keeps_distance(scratch.Keep(s.num_key_blocks)),
        keep(scratch.Keep(s.num_key_blocks)),
        sort_keys(scratch.SortKeys(s.num_key_blocks)) {}
  static int64_t Words(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
    const int64_t block = plan.geometry.block_size;
    const int64_t blocks = RoundUp(s.num_key_blocks, kLanePad);
    return LineMasses::Words(plan, s, plan.geometry.block_size) +
           s.num_key_blocks * block + 3 * blocks + kMeansTile * blocks +
           3 * RoundUp(s.num_key_blocks / 4 + 1, kLanePad) + 2 * blocks;
  }

  const SequenceGeometry& s;
  int32_t block_size;
  LineMasses masses;
  float* sorted;                      // [keys]
  float* column_blocks;               // [blocks]
  float* diagonal_blocks;             // [blocks] of the distances, the largest first
  float* estimate;                    // [blocks]
  float* logits;                      // [kMeansTile, padded blocks]
  std::span<uint8_t> keeps_column;    // [blocks]
  std::span<uint8_t> keeps_distance;  // [blocks] by block distance
  std::span<uint8_t> keep;
  std::span<uint64_t> sort_keys;
};

// The fewest lines whose mass passes gamma, as a number of blocks.
int32_t CountBlocks(const Lines& lines, const float* values, float gamma,
                    int32_t tokens_per_block) {
  const int32_t n = lines.s.k_len;
  std::copy_n(values, n, lines.sorted);
  std::sort(lines.sorted, lines.sorted + n, std::greater<>());
  double mass = 0;
  int32_t count = 0;
  while (count < n) {
    mass += lines.sorted[count];
    if (mass > gamma) break;
    ++count;
  }
  return std::clamp((count + 1) / tokens_per_block + 1, 1, lines.s.num_key_blocks);
}

// Masses of blocks of columns, and of blocks of distances that are counted from the
// largest distance, k_len - 1.
void SumBlocks(Lines& lines) {
  for (int32_t j = 0; j < lines.s.num_key_blocks; ++j) {
    const int32_t begin = j * lines.block_size;
    const int32_t end = std::min(begin + lines.block_size, lines.s.k_len);
    const float* columns = lines.masses.columns();
    const float* distances = lines.masses.distances() + lines.s.k_len;
    lines.column_blocks[j] = std::accumulate(columns + begin, columns + end, 0.0f);
    lines.diagonal_blocks[j] =
        std::accumulate(distances - end, distances - begin, 0.0f);
  }
}

// Marks the `count` largest; of equal ones the lower index first.
void KeepLargest(const Lines& lines, const float* values, int32_t count,
                 std::span<uint8_t> keep) {
  const auto n = keep.size();
  for (size_t j = 0; j < n; ++j) {
    const uint32_t falling = ~std::bit_cast<uint32_t>(values[j]);
    lines.sort_keys[j] =
        (static_cast<uint64_t>(falling) << 32) | static_cast<uint32_t>(j);
  }
  std::sort(lines.sort_keys.begin(), lines.sort_keys.end());
  std::fill(keep.begin(), keep.end(), uint8_t{0});
  for (int32_t i = 0; i < count; ++i) keep[lines.sort_keys[i] & 0xFFFFFFFFu] = 1;
}

// logits [rows, padded blocks] of queries [rows, head_dim], scaled.
void ScoreMeans(const AttentionRun& run, const Unit& unit, const float* queries,
                int32_t rows, float* logits) {
  const int32_t head_dim = run.plan.geometry.head_dim;
  MultiplyMeans(run, unit, queries, rows, logits);
  run.kernels.divide(std::sqrt(static_cast<float>(head_dim)), logits,
                     int64_t{rows} * PaddedBlocks(run.Sequence(unit)));
}

// Softmax of [0, count) in place. False when a logit is not finite.
bool Softmax(float* row, int32_t count) {
  const float top = *std::max_element(row, row + count);
  double sum = 0;
  for (int32_t j = 0; j < count; ++j) {
    if (!std::isfinite(row[j])) return false;
    row[j] = std::exp(row[j] - top);
    sum += row[j];
  }
  for (int32_t j = 0; j < count; ++j) row[j] = static_cast<float>(row[j] / sum);
  return true;
}

// Fills `estimate` from the mean of the last queries.
bool EstimateColumns(const AttentionRun& run, const Unit& unit, const Lines& lines) {
  float mean[kHeadDims.back()];
  const int32_t rows = lines.masses.num_queries();
  MeanOfRows(run, lines.masses.queries(), rows, rows, mean);
  ScoreMeans(run, unit, mean, 1, lines.logits);
  std::copy_n(lines.logits, lines.s.num_key_blocks, lines.estimate);
  return Softmax(lines.estimate, lines.s.num_key_blocks);
}

// Root of the Jensen-Shannon divergence of estimate and columns, with the natural
// logarithm. As published, a block without any mass makes it NaN.
double Distance(const Lines& lines, bool as_published) {
  double divergence = 0;
  for (int32_t j = 0; j < lines.s.num_key_blocks; ++j) {
    const double p = lines.estimate[j];
    const double q = lines.column_blocks[j];
    const double middle = (p + q) / 2;
    for (const double x : {p, q}) {
      if (x > 0 || as_published) divergence += x / 2 * std::log(x / middle);
    }
  }
  return std::sqrt(divergence < 0 ? 0 : divergence);  // rounding; passes NaN on
}

// Calls body(query block, probabilities [candidates]) for all rows of the head, in
// order. False when a logit is not finite.
template <class Body>
bool ForEachRow(const AttentionRun& run, const Unit& unit, int32_t member,
                const Lines& lines, Body&& body) {
  const int32_t blocks = lines.s.num_query_blocks;
  const int64_t head_dim = run.plan.geometry.head_dim;
  const float* queries = PooledQueries(run, unit, member);
  for (int32_t first = 0; first < blocks; first += kMeansTile) {
    const int32_t rows = std::min(kMeansTile, blocks - first);
    ScoreMeans(run, unit, queries + first * head_dim, rows, lines.logits);
    for (int32_t i = 0; i < rows; ++i) {
      float* row = lines.logits + static_cast<int64_t>(i) * PaddedBlocks(lines.s);
      const int32_t count = NumCandidates(run, unit, first + i);
      if (count > 0 && !Softmax(row, count)) return false;
      body(first + i, std::span<const float>(row, static_cast<size_t>(count)));
    }
  }
  return true;
}

// Which probabilities of a head's grid are kept: those above `least`, and the first
// `ties` that equal it.
struct GridCut {
  uint32_t least = 0;
  int64_t ties = 0;
};

// The largest probabilities of the whole grid whose sum stays within `mass`. Finds the
// bits of the smallest one digit by digit, so that memory does not grow with the grid.
// False when a logit is not finite.
bool CutGrid(const AttentionRun& run, const Unit& unit, int32_t member,
             const Lines& lines, double mass, GridCut& cut) {
  uint32_t known = 0;  // higher digits of the smallest
  double above = 0;    // mass of all that are larger
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    const int shift = digit * kDigitBits;
    std::array<double, kDigitValues> sums{};
    const bool finite =
        ForEachRow(run, unit, member, lines, [&](int32_t, std::span<const float> row) {
          for (float p : row) {
            const auto bits = std::bit_cast<uint32_t>(p);
            const bool matches =
                digit == kDigits - 1 || bits >> (shift + kDigitBits) == known;
            if (matches) sums[bits >> shift & (kDigitValues - 1)] += p;
          }
        });
    if (!finite) return false;
    int32_t value = kDigitValues - 1;
    while (value > 0 && above + sums[value] <= mass) above += sums[value--];
    known = known << kDigitBits | static_cast<uint32_t>(value);
  }
  cut.least = known;
  const double smallest = std::bit_cast<float>(known);
  cut.ties = smallest > 0 ? static_cast<int64_t>((mass - above) / smallest) : INT64_MAX;
  return true;
}

// Block columns and block distances of a head that selects by lines.
void KeepLines(const AttentionRun& run, const Unit& unit, Lines& lines,
               bool only_forced) {
  const AttentionOptions& options = run.plan.problem.options;
  const int32_t tokens = options.as_published ? 128 : lines.block_size;
  const int32_t num_columns =
      only_forced ? 1
                  : CountBlocks(lines, lines.masses.columns(), options.gamma, tokens);
  const int32_t num_distances =
      only_forced ? 1
                  : CountBlocks(lines, lines.masses.distances(), options.gamma, tokens);
  const int32_t last = lines.s.num_key_blocks - 1;
  if (options.force_first_block) lines.column_blocks[run.FirstBlock(unit)] = INFINITY;
  lines.diagonal_blocks[last] = INFINITY;
  KeepLargest(lines, lines.column_blocks, num_columns, lines.keeps_column);
  KeepLargest(lines, lines.diagonal_blocks, num_distances, lines.keep);
  for (int32_t y = 0; y <= last; ++y) lines.keeps_distance[last - y] = lines.keep[y];
}

}  // namespace

int64_t LinesWords(const CpuAttentionPlan& plan, const SequenceGeometry& s) {
  return Lines::Words(plan, s);
}

void SelectByLines(AttentionRun& run, const Unit& unit, const SelectItem& item,
                   int worker) {
  const AttentionOptions& options = run.plan.problem.options;
  Lines lines(run, unit, ItemScratch(run, worker));
  if (!lines.masses.Measure(item.member, run.plan.geometry.head_dim) ||
      !EstimateColumns(run, unit, lines)) {
    run.non_finite = true;
    return;
  }
  SumBlocks(lines);
  const bool query_aware =
      Distance(lines, options.as_published) < options.tau;  // false for NaN
  KeepLines(run, unit, lines, query_aware);
  GridCut cut = {.least = UINT32_MAX, .ties = 0};
  if (query_aware) {
    int32_t rows = 0;  // each has mass 1
    for (int32_t i = 0; i < lines.s.num_query_blocks; ++i) {
      rows += NumCandidates(run, unit, i) > 0 ? 1 : 0;
    }
    const double mass = double{options.gamma} * rows;
    if (!CutGrid(run, unit, item.member, lines, mass, cut)) {
      run.non_finite = true;
      return;
    }
  }
  const uint8_t all = options.gamma >= 1.0f ? 1 : 0;
  const auto finish_row = [&](int32_t query_block, std::span<const float> row) {
    const int32_t block = lines.s.first_query_block + query_block;
    for (int32_t j = 0; j <= block; ++j) {
      lines.keep[j] = all | lines.keeps_column[j] | lines.keeps_distance[block - j];
    }
    for (size_t j = 0; j < row.size(); ++j) {
      const auto bits = std::bit_cast<uint32_t>(row[j]);
      if (bits > cut.least || (bits == cut.least && cut.ties-- > 0)) lines.keep[j] = 1;
    }
    StoreList(run, unit, item.member, query_block, lines.keep);
  };
  if (query_aware) {
    ForEachRow(run, unit, item.member, lines, finish_row);
  } else {
    for (int32_t i = 0; i < lines.s.num_query_blocks; ++i) finish_row(i, {});
  }
}

}  // namespace pbs::cpu
