// The reference that tests compare with: every method in plain f64 loops, in the terms
// of docs/KERNELS.md. It shares the geometry and the dtype conversions with the
// backends, but no computation.
//
// Shapes and options as pbs/attention.h. Results are packed: o [num_heads, total_q,
// head_dim], lse [num_heads, total_q], order [num_order_heads, total_k].
//
// Threading: stateless. Memory: O(k_len) temporaries per query row, results as above.
#pragma once

#include <set>
#include <vector>

#include "pbs/attention.h"

namespace pbs::reference {

// The sum of the logits of Attend() over the head dim. An f32 backend differs from f64
// logits by the rounding of that sum, which grows with the logits. From f32 logits in
// the same order of summation it differs only by its softmax and output sums.
enum class LogitSum {
  kF64,
  kF32,  // in head-dim order, rounded after every fused multiply-add
};

struct Decision {
  std::vector<int32_t> order;
  BlockLists lists;
  int32_t heads_fallen_back = 0;  // order heads whose dense fallback fired
  // [num_sequences, num_order_heads], 1: runs dense, short sequences included.
  std::vector<uint8_t> ran_dense = {};
  std::set<int32_t> guarded_heads = {};  // as AttentionReport::guarded_heads
  // As AttentionReport::lines.
  std::vector<ChosenLines> lines = {};
};

// The decision of a backend's run.
inline Decision DecisionOf(const AttentionReport& report) {
  return {.order = report.order, .lists = report.lists, .lines = report.lines};
}

struct Output {
  std::vector<double> o;
  std::vector<double> lse;
};

struct Result {
  Decision decision;
  Output output;
  AttentionStats stats;  // no times; coverage when asked for
};

// Importance of the keys of one sequence's whole segments for one order head
// (sections 2.1-2.4 of docs/KERNELS.md); [k_len / segment_size * segment_size].
std::vector<double> KeyImportance(const AttentionProblem& problem,
                                  const AttentionTensors& tensors, int32_t sequence,
                                  int32_t order_head);

// What the last queries of one query head of one sequence pay to each key slot and to
// each distance, [k_len] each (minference). Infinity where the line is always chosen.
struct LineMasses {
  std::vector<double> columns;
  std::vector<double> distances;
};
LineMasses MassesOfLines(const AttentionProblem& problem,
                         const AttentionTensors& tensors, int32_t sequence,
                         int32_t head);

// Key order, block lists and lines of `problem`. Given ones are used unchecked.
Decision Decide(const AttentionProblem& problem, const AttentionTensors& tensors);

// Attention under `decision`, which may be a backend's. A row that sees nothing has o =
// 0 and lse = -inf.
Output Attend(const AttentionProblem& problem, const AttentionTensors& tensors,
              const Decision& decision, LogitSum logit_sum = LogitSum::kF64);

// Mean share of the exact softmax mass inside the selected blocks, over
// options.coverage_rows rows per sequence and query head (CoverageRow()).
double Coverage(const AttentionProblem& problem, const AttentionTensors& tensors,
                const Decision& decision);

// Decide(), Attend() and Coverage() together. Requires ValidateProblem(problem).ok()
// and finite inputs.
Result Run(const AttentionProblem& problem, const AttentionTensors& tensors);

}  // namespace pbs::reference
