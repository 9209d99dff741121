// Parity with the published code of other methods (tests/golden/README.md): on the
// reference, and on every table of the CPU backend.
//
//   mask      identical to theirs, in f32 and in half precision; prism in bf16 but for
//             one block
//   output    given their mask: f32 within 2e-5, f16 and bf16 within 2e-3 and 4e-2, and
//             half an ulp of the type that theirs is stored in
//   lines     of minference: identical in f32; in bf16 those next to the smallest
//   chosen
//             mass may differ
//   NumPy     cases of a model of the rules, masks only
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/cpu_attention.h"
#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/support/attention_case.h"
#include "tests/support/attention_matrix.h"
#include "tests/support/golden_case.h"

namespace pbs::cpu {
namespace {

using testing_support::BackendRun;
using testing_support::BaselineCases;
using testing_support::BlocksThatDiffer;
using testing_support::BlocksThatMayDiffer;
using testing_support::GoldenCase;
using testing_support::LineCases;
using testing_support::LineDifference;
using testing_support::LinesMayDiffer;
using testing_support::MeanCorrectionCases;
using testing_support::RunOn;

void ExpectPublishedLines(GoldenCase& golden, const std::vector<ChosenLines>& ours) {
  const LineDifference difference = testing_support::CompareLines(
      golden.problem, golden.Tensors(), ours, golden.Lines());
  std::printf("%-52s %ld of %ld lines differ, masses by up to %.1e\n",
              golden.name.c_str(), static_cast<long>(difference.differ),
              static_cast<long>(difference.lines), difference.apart);
  EXPECT_LE(difference.differ, LinesMayDiffer(golden).differ);
  EXPECT_LE(difference.apart, LinesMayDiffer(golden).apart);
}

double OutputTolerance(const GoldenCase& golden) {
  const DType dtype = golden.problem.dtype;
  const double computed = dtype == DType::kF32   ? 2e-5
                          : dtype == DType::kF16 ? 2e-3
                                                 : 4e-2;
  return computed + golden.StorageError();
}

TEST(GoldenReferenceSpec, MasksAreThePublishedOnes) {
  std::vector<GoldenCase> cases = BaselineCases();
  ASSERT_EQ(cases.size(), 22u);
  for (GoldenCase& golden : cases) {
    const auto decision = reference::Decide(golden.problem, golden.Tensors());
    const std::vector<uint8_t> mask =
        ExpandMask(MakeGeometry(golden.problem), decision.lists.View());
    const int64_t differ = BlocksThatDiffer(mask, golden.mask());
    std::printf("%-52s reference: %ld blocks differ\n", golden.name.c_str(),
                static_cast<long>(differ));
    EXPECT_LE(differ, BlocksThatMayDiffer(golden)) << golden.name;
  }
}

TEST(GoldenReferenceSpec, ColumnsAndDistancesAreThePublishedOnes) {
  std::vector<GoldenCase> cases = LineCases();
  ASSERT_EQ(cases.size(), 2u);
  for (GoldenCase& golden : cases) {
    ExpectPublishedLines(golden,
                         reference::Decide(golden.problem, golden.Tensors()).lines);
  }
}

TEST(GoldenReferenceSpec, MeanCorrectionIsThePublishedOneGivenTheirMask) {
  std::vector<GoldenCase> cases = MeanCorrectionCases();
  ASSERT_EQ(cases.size(), 3u);
  for (GoldenCase& golden : cases) {
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    golden.GiveOrderAndMask(problem, tensors, lists);
    const reference::Result result = reference::Run(problem, tensors);
    const double distance = golden.DistanceFromGolden(result.output);
    std::printf("%-52s reference: distance %.1e\n", golden.name.c_str(), distance);
    EXPECT_LE(distance, OutputTolerance(golden)) << golden.name;
  }
}

class GoldenBaselineSpec : public testing::TestWithParam<Isa> {
 protected:
  ThreadPool pool_{2};
  CpuAttention attention_{pool_, GetParam(), GetParam() == Isa::kAvx512Bf16};
};

TEST_P(GoldenBaselineSpec, MasksAreThePublishedOnes) {
  for (GoldenCase& golden : BaselineCases()) {
    SCOPED_TRACE(golden.name);
    const BackendRun run = RunOn(attention_, golden.problem, golden.Tensors());
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    const std::vector<uint8_t> mask =
        ExpandMask(MakeGeometry(golden.problem), run.report.lists.View());
    const int64_t differ = BlocksThatDiffer(mask, golden.mask());
    std::printf("%-52s %ld blocks differ\n", golden.name.c_str(),
                static_cast<long>(differ));
    EXPECT_LE(differ, BlocksThatMayDiffer(golden));
    if (differ > 0) continue;
    EXPECT_NEAR(run.report.stats.CausalRatio(), golden.density(), 1e-6);
  }
}

TEST_P(GoldenBaselineSpec, ColumnsAndDistancesAreThePublishedOnes) {
  for (GoldenCase& golden : LineCases()) {
    SCOPED_TRACE(golden.name);
    const BackendRun run = RunOn(attention_, golden.problem, golden.Tensors());
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    ExpectPublishedLines(golden, run.report.lines);
  }
}

TEST_P(GoldenBaselineSpec, OutputsAreThePublishedOnesGivenTheirMask) {
  for (GoldenCase& golden : BaselineCases()) {
    if (!golden.has_output()) continue;
    SCOPED_TRACE(golden.name);
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    golden.GiveOrderAndMask(problem, tensors, lists);
    const BackendRun run = RunOn(attention_, problem, tensors);
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    const double distance = golden.DistanceFromGolden();
    std::printf("%-52s distance from theirs %.1e\n", golden.name.c_str(), distance);
    EXPECT_LE(distance, OutputTolerance(golden));
  }
}

TEST_P(GoldenBaselineSpec, MeanCorrectionIsThePublishedOneGivenTheirMask) {
  for (GoldenCase& golden : MeanCorrectionCases()) {
    SCOPED_TRACE(golden.name);
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    golden.GiveOrderAndMask(problem, tensors, lists);
    const BackendRun run = RunOn(attention_, problem, tensors);
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    const double distance = golden.DistanceFromGolden();
    std::printf("%-52s distance from theirs %.1e\n", golden.name.c_str(), distance);
    EXPECT_LE(distance, OutputTolerance(golden));
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, GoldenBaselineSpec, testing::ValuesIn(SupportedIsas()),
                         [](const auto& table) { return IsaName(table.param); });

}  // namespace
}  // namespace pbs::cpu
