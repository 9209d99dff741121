// Spec: the CUDA pipeline on the emulator against the authors' own outputs
// (tests/golden/README.md), in half precision: masks identical given their order
// (prism: but for one block), columns and distances but for those next to the smallest
// chosen mass, outputs within 2e-3 (f16) and 4e-2 (bf16) given their
// order and mask.
#include "tests/support/golden_case.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "pbs/block_mask.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/support/attention_matrix.h"

namespace pbs::emulator {
namespace {

using testing_support::GoldenCase;
using testing_support::GoldenCases;

// Longer ones take the emulator too long.
constexpr int32_t kTokensMax = 700;

template <class Values>
void Allow(const Values& values) {
  if (values.empty()) return;
  GlobalMemory::Allow(values.data(),
                      static_cast<int64_t>(values.size() * sizeof(values[0])), true);
}

template <class Element, int kHeadDim>
void Run(GoldenCase& golden, const AttentionProblem& problem,
         const AttentionTensors& tensors, AttentionReport* report) {
  const auto plan = cuda::MakeCudaPlan(problem, {});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  golden.ForEachArray([](const void* data, int64_t bytes, bool written) {
    GlobalMemory::Allow(data, bytes, written);
  });
  const PipelineRun<Element, kHeadDim> run(**plan, tensors, 1);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  ASSERT_TRUE(run.Report({.lists = true}, report).ok());
}

void RunAny(GoldenCase& golden, const AttentionProblem& problem,
            const AttentionTensors& tensors, AttentionReport* report) {
  if (problem.dtype == DType::kF16) {
    ASSERT_EQ(problem.shape.head_dim, 64);
    Run<cuda::F16Element, 64>(golden, problem, tensors, report);
  } else if (problem.shape.head_dim == 64) {
    Run<cuda::Bf16Element, 64>(golden, problem, tensors, report);
  } else {
    ASSERT_EQ(problem.shape.head_dim, 128);
    Run<cuda::Bf16Element, 128>(golden, problem, tensors, report);
  }
}

std::vector<GoldenCase> ShortCases() {
  std::vector<GoldenCase> cases;
  for (GoldenCase& golden : GoldenCases(/*f32=*/false)) {
    if (golden.problem.shape.sequences[0].k_len <= kTokensMax) {
      cases.push_back(std::move(golden));
    }
  }
  return cases;
}

TEST(GoldenOnTheEmulatorSpec, MasksAreTheAuthorsGivenTheirOrder) {
  int checked = 0;
  for (GoldenCase& golden : ShortCases()) {
    if (!golden.has_mask()) continue;  // the case that runs dense
    SCOPED_TRACE(golden.name);
    GlobalMemory::Clear();
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    golden.GiveOrder(problem, tensors);
    Allow(golden.order());
    AttentionReport report;
    RunAny(golden, problem, tensors, &report);
    EXPECT_EQ(ExpandMask(MakeGeometry(problem), report.lists.View()), golden.mask());
    ++checked;
  }
  EXPECT_EQ(checked, 3);
}

// Blocks of 128 in half precision.
std::vector<GoldenCase> CasesOfOtherMethods() {
  std::vector<GoldenCase> cases;
  for (GoldenCase& golden : testing_support::BaselineCases()) {
    const AttentionOptions& options = golden.problem.options;
    if (options.block_size == 128 && golden.problem.dtype != DType::kF32) {
      cases.push_back(std::move(golden));
    }
  }
  return cases;
}

TEST(GoldenOnTheEmulatorSpec, MasksOfOtherMethodsAreThePublishedOnes) {
  int checked = 0;
  for (GoldenCase& golden : CasesOfOtherMethods()) {
    SCOPED_TRACE(golden.name);
    GlobalMemory::Clear();
    AttentionReport report;
    RunAny(golden, golden.problem, golden.Tensors(), &report);
    const std::vector<uint8_t> mask =
        ExpandMask(MakeGeometry(golden.problem), report.lists.View());
    EXPECT_LE(testing_support::BlocksThatDiffer(mask, golden.mask()),
              testing_support::BlocksThatMayDiffer(golden));
    ++checked;
  }
  EXPECT_EQ(checked, 6);
}

TEST(GoldenOnTheEmulatorSpec, ColumnsAndDistancesAreThePublishedOnes) {
  int checked = 0;
  for (GoldenCase& golden : testing_support::LineCases()) {
    if (golden.problem.dtype == DType::kF32) continue;
    SCOPED_TRACE(golden.name);
    GlobalMemory::Clear();
    const AttentionTensors tensors = golden.Tensors();
    AttentionReport report;
    RunAny(golden, golden.problem, tensors, &report);
    const testing_support::LineDifference difference = testing_support::CompareLines(
        golden.problem, tensors, report.lines, golden.Lines());
    EXPECT_LE(difference.differ, testing_support::LinesMayDiffer(golden).differ);
    EXPECT_LE(difference.apart, testing_support::LinesMayDiffer(golden).apart);
    ++checked;
  }
  EXPECT_EQ(checked, 1);
}

TEST(GoldenOnTheEmulatorSpec, OutputsAreTheAuthorsGivenTheirOrderAndMask) {
  int checked = 0;
  for (GoldenCase& golden : ShortCases()) {
    SCOPED_TRACE(golden.name);
    GlobalMemory::Clear();
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    golden.GiveOrderAndMask(problem, tensors, lists);
    Allow(golden.order());
    Allow(lists.begin);
    Allow(lists.count);
    Allow(lists.indices);
    AttentionReport report;
    RunAny(golden, problem, tensors, &report);
    EXPECT_LE(golden.DistanceFromGolden(),
              golden.problem.dtype == DType::kF16 ? 2e-3 : 4e-2);
    ++checked;
  }
  EXPECT_EQ(checked, 4);
}

TEST(GoldenOnTheEmulatorSpec, MeanCorrectionIsThePublishedOneGivenTheirMask) {
  int checked = 0;
  for (GoldenCase& golden : testing_support::MeanCorrectionCases()) {
    AttentionProblem problem = golden.problem;
    if (problem.dtype == DType::kF32 || problem.options.block_size != 128) continue;
    SCOPED_TRACE(golden.name);
    GlobalMemory::Clear();
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    golden.GiveOrderAndMask(problem, tensors, lists);
    Allow(lists.begin);
    Allow(lists.count);
    Allow(lists.indices);
    AttentionReport report;
    RunAny(golden, problem, tensors, &report);
    EXPECT_LE(golden.DistanceFromGolden(), 4e-2);
    ++checked;
  }
  EXPECT_EQ(checked, 1);
}

}  // namespace
}  // namespace pbs::emulator
