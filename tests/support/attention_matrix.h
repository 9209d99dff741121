// The table of methods, options and shapes that every attention backend is tested on,
// and the comparison with the reference.
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
#include "tests/support/tolerances.h"

namespace pbs::testing_support {

struct MatrixMethod {
  std::string name;
  AttentionOptions options;
};

struct MatrixShape {
  const char* name;
  int32_t num_heads, num_kv_heads, head_dim;
  std::vector<SequenceShape> sequences;
};

inline AttentionProblem MatrixProblem(const MatrixShape& shape, DType dtype,
                                      const AttentionOptions& options) {
  AttentionProblem problem;
  problem.shape = {shape.num_heads, shape.num_kv_heads, shape.head_dim,
                   shape.sequences};
  problem.dtype = dtype;
  problem.options = options;
  return problem;
}

// Every method that selects blocks, with options that leave some blocks out. Blocks of
// 16 keys, segments of 32.
inline std::vector<MatrixMethod> SelectingMethods() {
  AttentionOptions pbs;
  pbs.block_size = 16;
  pbs.segment_size = 32;
  pbs.threshold = 0.6f;
  AttentionOptions plain = pbs;
  plain.segment_size = AttentionOptions{}.segment_size;
  const auto with = [](AttentionOptions options, Method method) {
    options.method = method;
    const bool has_threshold =
        (TraitsOf(method).options & FindOption("threshold")->bit) != 0;
    if (!has_threshold) options.threshold = AttentionOptions{}.threshold;
    options.gamma = method == Method::kFlexPrefill ? 0.6f : options.gamma;
    options.alpha = method == Method::kFlashPrefill ? 0.6f : options.alpha;
    return options;
  };
  AttentionOptions minference = with(plain, Method::kMInference);
  minference.vertical_tokens = 36;
  minference.slash_tokens = 60;
  return {{"pbs", pbs},
          {"mean_pooling", with(plain, Method::kMeanPooling)},
          {"xattention", with(plain, Method::kXAttention)},
          {"flexprefill", with(plain, Method::kFlexPrefill)},
          {"prism", with(plain, Method::kPrism)},
          {"flashprefill", with(plain, Method::kFlashPrefill)},
          {"minference", minference}};
}

// Adds variants of methods to a table.
class MethodTable {
 public:
  explicit MethodTable(std::vector<MatrixMethod> methods)
      : methods_(std::move(methods)) {}

  // `change` takes the options of the row named `of`.
  template <class Change>
  void Add(const std::string& name, const std::string& of, Change&& change) {
    const auto base =
        std::find_if(methods_.begin(), methods_.end(),
                     [&](const MatrixMethod& method) { return method.name == of; });
    AttentionOptions options = base->options;
    change(options);
    methods_.push_back({name, options});
  }
  std::vector<MatrixMethod> Take() { return std::move(methods_); }

 private:
  std::vector<MatrixMethod> methods_;
};

// Options that one method has, or that it treats in its own way.
inline void AddOwnOptions(MethodTable& table) {
  table.Add("pbs_large_segments", "pbs", [](auto& o) { o.segment_size = 48; });
  table.Add("pbs_fallback", "pbs", [](auto& o) { o.dense_fallback = true; });
  table.Add("xattention_published", "xattention",
            [](auto& o) { o.as_published = true; });
  table.Add("xattention_stride_2", "xattention", [](auto& o) { o.stride = 2; });
  table.Add("xattention_stride_16", "xattention", [](auto& o) { o.stride = 16; });
  table.Add("flexprefill_query_aware", "flexprefill", [](auto& o) { o.tau = 1; });
  table.Add("flexprefill_lines_only", "flexprefill", [](auto& o) { o.tau = 0; });
  table.Add("flexprefill_published", "flexprefill",
            [](auto& o) { o.as_published = true; });
  table.Add("minference_published", "minference",
            [](auto& o) { o.as_published = true; });
  // The fewest lines: all distances of up to 50 keys.
  table.Add("minference_few_lines", "minference", [](auto& o) {
    o.vertical_tokens = 1;
    o.slash_tokens = 1;
  });
  table.Add("minference_far", "minference", [](auto& o) { o.slash_tokens = 112; });
  table.Add("minference_fallback", "minference",
            [](auto& o) { o.dense_fallback = true; });
  table.Add("prism_bands", "prism", [](auto& o) {
    o.slow_dims = 12;
    o.fast_dims = 6;
    o.fast_threshold = 0.3f;
  });
  table.Add("flashprefill_published", "flashprefill", [](auto& o) {
    o.as_published = true;
    o.sink_blocks = 1;
    o.window_blocks = 2;
  });
}

// Options of several methods.
inline void AddSharedOptions(MethodTable& table) {
  for (const char* name : {"pbs", "xattention", "flexprefill"}) {
    // So that some heads are guarded and some are not.
    table.Add(std::string(name) + "_guarded", name, [](auto& o) {
      o.coverage_rows = 5;
      o.coverage_min = 0.9f;
    });
  }
  for (const char* name : {"pbs", "mean_pooling", "xattention", "flexprefill"}) {
    table.Add(std::string(name) + "_no_first_block", name,
              [](auto& o) { o.force_first_block = false; });
  }
  for (const char* name : {"pbs", "prism", "minference"}) {
    table.Add(std::string(name) + "_tail_sink_window", name, [](auto& o) {
      o.dense_tail_blocks = 1;
      o.sink_blocks = 2;
      o.window_blocks = 3;
      if (o.method == Method::kMInference) return;
      o.threshold = 0.2f;
      o.force_first_block = false;
    });
  }
  for (const char* name :
       {"mean_pooling", "xattention", "xattention_published", "flexprefill",
        "flexprefill_query_aware", "prism", "flashprefill", "flashprefill_published",
        "minference", "minference_tail_sink_window"}) {
    table.Add(std::string(name) + "_permuted", name, [](auto& o) {
      o.permute = true;
      o.segment_size = 32;
    });
  }
  for (const char* name :
       {"pbs", "prism_permuted", "flashprefill_permuted", "minference_permuted"}) {
    table.Add(std::string(name) + "_query_head", name,
              [](auto& o) { o.scope = Scope::kQueryHead; });
  }
  for (const char* name :
       {"pbs", "pbs_query_head", "mean_pooling", "flexprefill", "flashprefill",
        "xattention_permuted", "prism_tail_sink_window", "minference",
        "minference_permuted", "minference_tail_sink_window"}) {
    table.Add(std::string(name) + "_corrected", name,
              [](auto& o) { o.mean_correction = true; });
  }
}

// The selecting methods, what their options change, and dense.
inline std::vector<MatrixMethod> MatrixMethods() {
  MethodTable table(SelectingMethods());
  AddOwnOptions(table);
  AddSharedOptions(table);
  std::vector<MatrixMethod> methods = table.Take();
  methods.push_back({"dense", {.method = Method::kDense, .block_size = 16}});
  return methods;
}

// For blocks of 16 keys.
inline std::vector<MatrixShape> MatrixShapes() {
  return {{"odd_length", 2, 1, 64, {{149, 149}}},
          {"whole_segments", 2, 2, 32, {{128, 128}}},
          {"tail_of_one", 4, 2, 96, {{129, 129}}},
          {"six_heads_of_one", 6, 1, 32, {{100, 100}}},
          {"wide_head", 1, 1, 256, {{117, 117}}},
          {"one_query", 2, 1, 64, {{1, 131}}},
          {"offset_inside_a_block", 2, 1, 128, {{59, 141}}},
          {"offset_at_a_block", 2, 1, 32, {{64, 160}}},
          {"many_tiles", 6, 2, 32, {{300, 300}}},
          {"packed", 4, 2, 64, {{75, 75}, {0, 0}, {1, 1}, {0, 40}, {33, 110}, {9, 9}}}};
}

// The same options for blocks of 128 keys, and shapes for them.
inline AttentionOptions WithBlocksOf128(AttentionOptions options) {
  const int32_t factor = 128 / options.block_size;
  options.block_size = 128;
  if (Permutes(options)) options.segment_size *= factor;
  return options;
}
inline std::vector<MatrixShape> ShapesOfBlocksOf128() {
  return {{"odd_length", 4, 2, 96, {{701, 701}}},
          {"batch", 4, 2, 64, {{513, 513}, {1, 1}, {90, 650}}}};
}

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
