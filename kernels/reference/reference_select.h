// What the scorers of the reference share. Each scorer has a file, reference_*.cc; it
// says which blocks of a query head are kept by their scores. Private to the reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/operands.h"
#include "reference/reference_attention.h"

namespace pbs::reference {

// One query head of one sequence. Query rows are named by their position, keys by their
// slot.
struct SelectingHead {
  const AttentionProblem& problem;
  const AttentionGeometry& g;
  const Operands& in;
  int32_t head = 0;
  const int32_t* order = nullptr;  // [k_len] position of the key in each slot

  const SequenceGeometry& s() const { return in.shape(); }
  const AttentionOptions& options() const { return problem.options; }

  double Q(int32_t position, int32_t d) const {
    return in.Q(head, position - s().query_offset, d);
  }
  double K(int32_t slot, int32_t d) const {
    return in.K(g.KvHead(head), order[slot], d);
  }
  bool HasQuery(int32_t position) const {
    return position >= s().query_offset && position < s().k_len;
  }
  // The last block of queries.
  int32_t FirstOfLastQueries() const {
    return s().k_len - std::min(g.block_size, s().q_len);
  }

  // Absolute index of the i-th query block.
  int32_t Block(int32_t i) const { return s().first_query_block + i; }
  int32_t OwnBegin(int32_t i) const {
    return Block(i) / g.blocks_per_segment * g.blocks_per_segment;
  }
  // Blocks [0, count) compete by their scores. Sorted keys leave the own segment no
  // diagonal, and it is read whole.
  int32_t NumCandidates(int32_t i) const {
    return Permutes(options()) ? OwnBegin(i) : Block(i) + 1;
  }
  // The slot block that holds key 0.
  int32_t FirstBlock() const {
    const int32_t slot =
        static_cast<int32_t>(std::find(order, order + s().k_len, 0) - order);
    return slot / g.block_size;
  }
};

// Kept[i][j]: query block i keeps candidate j.
using Kept = std::vector<std::vector<bool>>;

Kept SelectByMeans(const SelectingHead& head);
Kept SelectByBands(const SelectingHead& head);
Kept SelectByRows(const SelectingHead& head);
Kept SelectByAntidiagonals(const SelectingHead& head);
Kept SelectByLines(const SelectingHead& head);

// Marks every block of the head when its marked blocks keep less than coverage_min of
// the sampled rows' mass on average; true when it did.
//   mask [query blocks, key blocks]
bool GuardHead(const SelectingHead& head, uint8_t* mask);

// Mass of the attention of the last queries, a mean over them, for logits divided by
// sqrt(`width`).
LineMasses MeasureLines(const SelectingHead& head, int32_t num_queries, int32_t width);

// Query block i (of the sequence's) reads key block j <= its own whatever its scores
// are. The first block is not counted.
inline bool IsForced(const AttentionOptions& options, const SequenceGeometry& s,
                     int32_t i, int32_t j) {
  return i >= s.num_query_blocks - options.dense_tail_blocks ||
         j < options.sink_blocks || s.first_query_block + i - j < options.window_blocks;
}

// [blocks][head_dim]
using Means = std::vector<std::vector<double>>;

// What the sum of a short block is divided by.
enum class ShortBlock { kBlockSize, kLength };

Means QueryMeans(const SelectingHead& head);  // by block_size
Means KeyMeans(const SelectingHead& head, ShortBlock divisor);

inline double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

}  // namespace pbs::reference
