// The comparison of an attention backend with the reference, on the rows of
// matrix_cases.h.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/support/attention_case.h"
#include "tests/support/largest_error.h"
#include "tests/support/matrix_cases.h"
#include "tests/support/tolerances.h"

namespace pbs::testing_support {

// The reference's answers by case. It is slow, and the engines nearly always decide
// alike, so the answers are kept and recomputed when a decision differs.
class ReferenceAnswers {
 public:
  const reference::Result& Run(const std::string& name, AttentionCase& inputs) {
    const auto found = results_.find(name);
    if (found != results_.end()) return found->second;
    return results_[name] = reference::Run(inputs.problem(), inputs.Tensors());
  }
  // Its output for the order and lists of a backend's report.
  const reference::Output& Attend(const std::string& name, AttentionCase& inputs,
                                  const AttentionReport& report) {
    const reference::Result& result = Run(name, inputs);
    if (DecidesAlike(result.decision, report)) return result.output;
    return other_ = reference::Attend(inputs.problem(), inputs.Tensors(),
                                      reference::DecisionOf(report));
  }
  static bool DecidesAlike(const reference::Decision& decision,
                           const AttentionReport& report) {
    return decision.order == report.order &&
           decision.lists.indices == report.lists.indices &&
           decision.lists.count == report.lists.count && decision.lines == report.lines;
  }

 private:
  std::map<std::string, reference::Result> results_;
  reference::Output other_;
};

inline void ExpectEqualStats(const AttentionStats& ours,
                             const AttentionStats& expected) {
  EXPECT_EQ(ours.executed_blocks, expected.executed_blocks);
  EXPECT_EQ(ours.lower_blocks, expected.lower_blocks);
  EXPECT_EQ(ours.causal_blocks, expected.causal_blocks);
  EXPECT_EQ(ours.dense_blocks, expected.dense_blocks);
  EXPECT_EQ(ours.method_run, expected.method_run);
  EXPECT_EQ(ours.dense_fallback, expected.dense_fallback);
  EXPECT_DOUBLE_EQ(ours.dense_flops, expected.dense_flops);
  EXPECT_DOUBLE_EQ(ours.executed_flops, expected.executed_flops);
  EXPECT_EQ(ours.coverage_rows, expected.coverage_rows);
  EXPECT_NEAR(ours.coverage, expected.coverage, kCoverageTolerance);
}

struct OutputErrors {
  double o = 0;
  double lse = 0;
};

inline OutputErrors LargestErrors(const AttentionCase& inputs,
                                  const reference::Output& expected) {
  const AttentionGeometry& g = inputs.geometry();
  OutputErrors errors;
  for (int32_t head = 0; head < g.num_heads; ++head) {
    for (int64_t row = 0; row < g.total_q; ++row) {
      const int64_t at = head * g.total_q + row;
      for (int32_t d = 0; d < g.head_dim; ++d) {
        errors.o = LargerError(errors.o, std::abs(inputs.O(head, row, d) -
                                                  expected.o[at * g.head_dim + d]));
      }
      errors.lse =
          LargerError(errors.lse, std::abs(inputs.Lse(head, row) - expected.lse[at]));
    }
  }
  return errors;
}

struct ListDifference {
  int64_t blocks = 0;   // selected by the reference
  int64_t differ = 0;   // selected by one of both only
  int64_t outside = 0;  // of those, not explained by the rounding of scores
};

// A block may differ when thresholds that differ by kThresholdSlack make the reference
// select it or not.
inline ListDifference CompareLists(const AttentionProblem& problem,
                                   const AttentionTensors& tensors,
                                   const BlockLists& ours, const BlockLists& expected) {
  const AttentionGeometry g = MakeGeometry(problem);
  const std::vector<uint8_t> mine = ExpandMask(g, ours.View());
  const std::vector<uint8_t> theirs = ExpandMask(g, expected.View());
  ListDifference difference;
  std::vector<std::vector<uint8_t>> near;
  if (mine != theirs) {
    for (const float change : {1 - kThresholdSlack, 1 + kThresholdSlack}) {
      std::vector<float> of_heads(tensors.head_thresholds.begin(),
                                  tensors.head_thresholds.end());
      for (float& x : of_heads) x = std::min(x * change, 1.0f);
      AttentionTensors near_tensors = tensors;
      near_tensors.head_thresholds = of_heads;
      AttentionProblem changed = problem;
      AttentionOptions& options = changed.options;
      for (float* x : {&options.threshold, &options.fast_threshold, &options.gamma,
                       &options.alpha}) {
        *x = std::min(*x * change, 1.0f);
      }
      near.push_back(
          ExpandMask(g, reference::Decide(changed, near_tensors).lists.View()));
    }
  }
  for (size_t i = 0; i < mine.size(); ++i) {
    difference.blocks += theirs[i];
    if (mine[i] == theirs[i]) continue;
    ++difference.differ;
    difference.outside += near[0][i] == near[1][i];
  }
  return difference;
}

struct LineDifference {
  int64_t lines = 0;   // chosen by the reference
  int64_t differ = 0;  // chosen by one of both only
  // How far the masses of these are at most from the smallest chosen one, relative.
  // Masses that underflow in f32 are equal.
  double apart = 0;
};

inline void CompareChosen(const std::vector<double>& masses,
                          const std::vector<int32_t>& ours,
                          const std::vector<int32_t>& expected,
                          LineDifference& difference) {
  double smallest = INFINITY;
  for (const int32_t line : expected) smallest = std::min(smallest, masses[line]);
  std::vector<int32_t> differ;
  std::set_symmetric_difference(ours.begin(), ours.end(), expected.begin(),
                                expected.end(), std::back_inserter(differ));
  for (const int32_t line : differ) {
    const double distance = std::abs(masses[line] - smallest);
    const bool equal = masses[line] < kMassUnderflow && smallest < kMassUnderflow;
    if (!equal) {
      difference.apart = std::isfinite(smallest)
                             ? std::max(difference.apart, distance / smallest)
                             : INFINITY;
    }
  }
  difference.differ += static_cast<int64_t>(differ.size());
}

inline LineDifference CompareLines(const AttentionProblem& problem,
                                   const AttentionTensors& tensors,
                                   const std::vector<ChosenLines>& ours,
                                   const std::vector<ChosenLines>& expected) {
  LineDifference difference;
  EXPECT_EQ(ours.size(), expected.size());
  for (size_t i = 0; i < std::min(ours.size(), expected.size()); ++i) {
    EXPECT_EQ(ours[i].columns.size(), expected[i].columns.size());
    EXPECT_EQ(ours[i].distances.size(), expected[i].distances.size());
    const auto lines =
        static_cast<int64_t>(expected[i].columns.size() + expected[i].distances.size());
    difference.lines += lines;
    if (ours[i] == expected[i] || lines == 0) continue;
    const int32_t num_heads = problem.shape.num_heads;
    const reference::LineMasses masses =
        reference::MassesOfLines(problem, tensors, static_cast<int32_t>(i) / num_heads,
                                 static_cast<int32_t>(i) % num_heads);
    CompareChosen(masses.columns, ours[i].columns, expected[i].columns, difference);
    CompareChosen(masses.distances, ours[i].distances, expected[i].distances,
                  difference);
  }
  return difference;
}

// Compares the runs of one backend with the reference, and sums up how lists differ.
class MatrixComparison {
 public:
  // `key` names the case; `pairs` is of OutputTolerance().
  void Compare(const std::string& key, AttentionCase& inputs,
               const AttentionReport& report, bool pairs) {
    const AttentionProblem& problem = inputs.problem();
    CompareDecisions(inputs, report, Answers().Run(key, inputs));
    for (double density : report.heads.density) EXPECT_LE(density, 1);
    const OutputErrors errors =
        LargestErrors(inputs, Answers().Attend(key, inputs, report));
    EXPECT_LE(errors.o, OutputTolerance(problem.dtype, pairs, problem.shape.head_dim));
    EXPECT_LE(errors.lse, LseTolerance(problem.dtype, problem.options.mean_correction));
  }
  void ExpectFewDiffer(const char* name) const {
    if (total_.blocks == 0) return;
    std::printf("%-20s %ld of %ld blocks differ, all next to a threshold\n", name,
                static_cast<long>(total_.differ), static_cast<long>(total_.blocks));
    EXPECT_LE(static_cast<double>(total_.differ),
              kBlocksInSlackMax * static_cast<double>(total_.blocks));
  }
  static ReferenceAnswers& Answers() {
    static auto& answers = *new ReferenceAnswers;
    return answers;
  }

 private:
  void CompareDecisions(AttentionCase& inputs, const AttentionReport& report,
                        const reference::Result& expected) {
    const AttentionProblem& problem = inputs.problem();
    if (report.order != expected.decision.order) {
      // Half-precision scores tie; see golden_test.cc for how far moved keys are apart.
      EXPECT_TRUE(problem.dtype != DType::kF32 &&
                  problem.options.scope == Scope::kQueryHead);
      return;
    }
    const LineDifference lines =
        CompareLines(problem, inputs.Tensors(), report.lines, expected.decision.lines);
    EXPECT_LE(lines.apart, kThresholdSlack);
    total_.blocks += lines.lines;
    total_.differ += lines.differ;
    if (lines.differ > 0) return;
    const ListDifference difference =
        CompareLists(problem, inputs.Tensors(), report.lists, expected.decision.lists);
    EXPECT_EQ(difference.outside, 0);
    total_.blocks += difference.blocks;
    total_.differ += difference.differ;
    if (difference.differ > 0) return;
    EXPECT_EQ(report.lists.num_masked, expected.decision.lists.num_masked);
    ExpectEqualStats(report.stats, expected.stats);
    const std::set<int32_t> guarded(report.heads.guarded.begin(),
                                    report.heads.guarded.end());
    EXPECT_EQ(guarded, expected.decision.guarded_heads);
  }

  ListDifference total_;
};

}  // namespace pbs::testing_support
