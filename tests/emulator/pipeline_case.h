// Whole runs of the CUDA pipeline on the emulator, compared with kernels/reference.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ostream>
#include <utility>
#include <vector>

#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/support/largest_error.h"

namespace pbs::emulator {

struct PipelineCase {
  const char* name;
  AttentionShape shape;
  AttentionOptions options;
  DType dtype = DType::kBF16;
};

inline void PrintTo(const PipelineCase& c, std::ostream* out) { *out << c.name; }

// Inside whole segments keys fall in importance, up to f32's rounding of it.
inline void ExpectSorted(const AttentionProblem& problem,
                         const AttentionTensors& tensors,
                         const std::vector<int32_t>& order) {
  const AttentionGeometry g = MakeGeometry(problem);
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      const int32_t* slots = order.data() + head * g.total_k + s.k_begin;
      const auto importance = s.dense || s.q_len == 0
                                  ? std::vector<double>()
                                  : reference::KeyImportance(problem, tensors, n, head);
      const auto body = static_cast<int32_t>(importance.size());
      for (int32_t begin = 0; begin < body; begin += g.segment_size) {
        std::vector<int32_t> segment(slots + begin, slots + begin + g.segment_size);
        for (size_t i = 1; i < segment.size(); ++i) {
          ASSERT_LE(importance[segment[i]], importance[segment[i - 1]] * (1 + 2e-5))
              << "sequence " << n << ", head " << head << ", slot " << begin + i;
        }
        std::sort(segment.begin(), segment.end());
        for (int32_t i = 0; i < g.segment_size; ++i) {
          ASSERT_EQ(segment[i], begin + i) << "sequence " << n << ", head " << head;
        }
      }
      for (int32_t slot = body; slot < s.k_len; ++slot) ASSERT_EQ(slots[slot], slot);
    }
  }
}

// Largest differences from the exact answer over the order and lists that ran.
inline void ExpectOutputs(const AttentionProblem& problem,
                          const AttentionTensors& tensors,
                          const AttentionReport& report, const PipelineInputs& inputs) {
  const reference::Decision decision = reference::DecisionOf(report);
  const reference::Output exact = reference::Attend(problem, tensors, decision);
  double o_error = 0;
  double lse_error = 0;
  for (size_t i = 0; i < exact.o.size(); ++i) {
    const uint16_t bits = inputs.o.data()[i];
    const float o =
        problem.dtype == DType::kBF16 ? ToFloat(bf16{bits}) : ToFloat(f16{bits});
    o_error = testing_support::LargerError(o_error, std::abs(o - exact.o[i]));
  }
  for (size_t i = 0; i < exact.lse.size(); ++i) {
    lse_error = testing_support::LargerError(
        lse_error, std::abs(inputs.lse.data()[i] - exact.lse[i]));
  }
  EXPECT_LE(o_error, problem.dtype == DType::kBF16 ? 3e-2 : 4e-3);
  EXPECT_LE(lse_error, 2e-5);
}

// What was counted on the way is what the lists hold.
inline void ExpectBlocksAreTheLists(const AttentionGeometry& g,
                                    const AttentionReport& report) {
  std::vector<int64_t> executed(static_cast<size_t>(g.num_heads));
  int64_t lower = 0;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      const int32_t block = s.first_query_block + i;
      for (int32_t head = 0; head < g.num_heads; ++head) {
        const auto list = report.lists.View().Row(g.ListRow(n, head, i));
        executed[head] += static_cast<int64_t>(list.size());
        lower += std::upper_bound(list.begin(), list.end(), block) - list.begin();
      }
    }
  }
  EXPECT_EQ(report.stats.lower_blocks, lower);
  ASSERT_EQ(report.heads.density.size(), executed.size());
  int64_t dense = 0;
  for (size_t head = 0; head < executed.size(); ++head) {
    EXPECT_LE(report.heads.density[head], 1) << "head " << head;
    dense +=
        std::llround(static_cast<double>(executed[head]) / report.heads.density[head]);
  }
  EXPECT_EQ(report.stats.dense_blocks, dense);
  EXPECT_DOUBLE_EQ(report.stats.Density(),
                   report.stats.executed_flops / report.stats.dense_flops);
}

inline void ExpectTimesAreOfEveryStage(const AttentionStats& stats) {
  EXPECT_GT(stats.permute_seconds, 0);
  EXPECT_GT(stats.select_seconds, 0);
  EXPECT_GT(stats.attend_seconds, 0);
  EXPECT_DOUBLE_EQ(stats.permute_seconds + stats.select_seconds + stats.attend_seconds,
                   1)
      << "the total of PipelineRun::Report()";
}

template <class Element, int kHeadDim>
void CheckRun(const AttentionProblem& problem, uint32_t seed) {
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  PipelineInputs inputs(problem, seed);
  inputs.MakeBlocksDiffer(problem, seed);
  GlobalMemory::Clear();
  inputs.Allow();
  const AttentionTensors tensors = inputs.Tensors();
  const PipelineRun<Element, kHeadDim> run(**plan, tensors, seed);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  AttentionReport report;
  ASSERT_TRUE(run.Report({.order = true, .lists = true}, &report).ok());
  ExpectBlocksAreTheLists((*plan)->geometry, report);
  ExpectTimesAreOfEveryStage(report.stats);
  if ((*plan)->orders) ExpectSorted(problem, tensors, report.order);
  if (problem.options.dense_fallback) {
    EXPECT_TRUE(report.stats.dense_fallback);
    EXPECT_EQ(report.stats.method_run, Method::kDense);
    EXPECT_EQ(report.stats.Density(), 1);
  } else {
    const reference::Result expected = reference::Run(problem, tensors);
    EXPECT_EQ(ExpandMask((*plan)->geometry, report.lists.View()),
              ExpandMask((*plan)->geometry, expected.decision.lists.View()));
    EXPECT_EQ(report.stats.executed_blocks, expected.stats.executed_blocks);
    EXPECT_EQ(report.stats.lower_blocks, expected.stats.lower_blocks);
    EXPECT_EQ(report.stats.causal_blocks, expected.stats.causal_blocks);
    EXPECT_EQ(report.stats.dense_blocks, expected.stats.dense_blocks);
    EXPECT_EQ(report.stats.method_run, expected.stats.method_run);
  }
  ExpectOutputs(problem, tensors, report, inputs);
}

// Runs a case for two seeds.
inline void CheckCase(const PipelineCase& c) {
  const AttentionProblem problem = {c.shape, c.dtype, c.options};
  for (uint32_t seed : {1u, 2u}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    if (problem.dtype == DType::kF16) {
      CheckRun<cuda::F16Element, 64>(problem, seed);
    } else if (problem.shape.head_dim == 96) {
      CheckRun<cuda::Bf16Element, 96>(problem, seed);
    } else if (problem.shape.head_dim == 256) {
      CheckRun<cuda::Bf16Element, 256>(problem, seed);
    } else {
      CheckRun<cuda::Bf16Element, 64>(problem, seed);
    }
  }
}

inline AttentionShape Shape(int32_t heads, int32_t kv_heads, int32_t head_dim,
                            std::vector<SequenceShape> sequences) {
  return {heads, kv_heads, head_dim, std::move(sequences)};
}

}  // namespace pbs::emulator
