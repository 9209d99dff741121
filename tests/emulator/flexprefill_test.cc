// Spec: cuda/selection, lists of flexprefill on the emulator: whole runs against
// kernels/reference, ties, and that each head chooses how it selects.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/plan/pipeline.h"
#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_case.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

class FlexPrefillSpec : public testing::TestWithParam<PipelineCase> {};

TEST_P(FlexPrefillSpec, EqualsTheReference) { CheckCase(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    Cases, FlexPrefillSpec,
    testing::Values(
        PipelineCase{"of_lines",
                     Shape(2, 1, 64, {{1000, 1000}}),
                     {.method = Method::kFlexPrefill, .gamma = 0.5f, .tau = 0}},
        PipelineCase{"of_block_means",
                     Shape(2, 1, 64, {{1000, 1000}}),
                     {.method = Method::kFlexPrefill, .gamma = 0.5f, .tau = 1}},
        // Chunks of several blocks, and more lines than blocks.
        PipelineCase{"of_many_blocks",
                     Shape(1, 1, 64, {{130, 4400}}),
                     {.method = Method::kFlexPrefill,
                      .dense_tail_blocks = 1,
                      .gamma = 0.8f,
                      .tau = 0}},
        PipelineCase{"of_many_block_means",
                     Shape(1, 1, 64, {{300, 4400}}),
                     {.method = Method::kFlexPrefill,
                      .force_first_block = false,
                      .gamma = 0.3f,
                      .tau = 1}},
        PipelineCase{"of_wide_heads",
                     Shape(1, 1, 256, {{200, 640}}),
                     {.method = Method::kFlexPrefill, .gamma = 0.4f, .tau = 0}},
        PipelineCase{
            "of_sorted_keys",
            Shape(4, 2, 64, {{900, 900}, {100, 1300}, {200, 200}}),
            {.method = Method::kFlexPrefill, .permute = true, .gamma = 0.4f, .tau = 0}},
        // The last block is sorted, so that keys lie behind their queries.
        PipelineCase{"of_sorted_last_keys",
                     Shape(2, 1, 96, {{1024, 1024}, {1, 768}}),
                     {.method = Method::kFlexPrefill,
                      .permute = true,
                      .sink_blocks = 1,
                      .as_published = true,
                      .gamma = 0.4f,
                      .tau = 0}},
        PipelineCase{
            "by_block_means_of_sorted_keys",
            Shape(4, 2, 64, {{900, 900}, {100, 1300}}),
            {.method = Method::kFlexPrefill, .permute = true, .gamma = 0.4f, .tau = 1}},
        PipelineCase{"of_sorted_keys_of_every_head",
                     Shape(2, 1, 64, {{800, 800}}),
                     {.method = Method::kFlexPrefill,
                      .scope = Scope::kQueryHead,
                      .permute = true,
                      .gamma = 0.6f,
                      .tau = 0}},
        PipelineCase{
            "fallback_where_lists_do_not_pay",
            Shape(1, 1, 64, {{700, 700}}),
            {.method = Method::kFlexPrefill, .dense_fallback = true, .gamma = 1}},
        PipelineCase{"of_f16_keeps_everything",
                     Shape(2, 1, 64, {{700, 700}}),
                     {.method = Method::kFlexPrefill, .gamma = 1},
                     DType::kF16}),
    testing_support::CaseName());

// All keys are alike for queries of zeros, so probabilities differ between query blocks
// alone. Of 8 rows of mass 1 gamma keeps 5.6: the first five, and of the sixth the
// first three of six ties.
TEST(FlexPrefillListsSpec, KeepsTheFirstOfEqualProbabilities) {
  const AttentionProblem problem{Shape(1, 1, 64, {{1000, 1000}}),
                                 DType::kBF16,
                                 {.method = Method::kFlexPrefill,
                                  .force_first_block = false,
                                  .gamma = 0.7f,
                                  .tau = 1}};
  const auto plan = cuda::MakeCudaPlan(problem, {});
  ASSERT_TRUE(plan.ok());
  PipelineInputs inputs(problem, 3);
  std::fill_n(inputs.q.data(), inputs.q.bytes() / 2, uint16_t{0});
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  AttentionReport report;
  ASSERT_TRUE(run.Report({.lists = true}, &report).ok());
  const auto list = [&](int64_t row) {
    const auto entries = report.lists.View().Row(row);
    return std::vector<uint16_t>(entries.begin(), entries.end());
  };
  EXPECT_EQ(list(4), (std::vector<uint16_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(list(5), (std::vector<uint16_t>{0, 1, 2, 5}));
  EXPECT_EQ(list(6), (std::vector<uint16_t>{0, 6}));
}

// A sorted key may lie behind its query, and the end of a sequence inside of a block:
// no mass is lost.
TEST(FlexPrefillListsSpec, ColumnsAndDiagonalsHoldAllMass) {
  for (const bool permute : {false, true}) {
    AttentionProblem problem{Shape(2, 1, 64, {{900, 1024}, {50, 700}}),
                             DType::kBF16,
                             {.method = Method::kFlexPrefill, .permute = permute}};
    const auto plan = cuda::MakeCudaPlan(problem, {});
    ASSERT_TRUE(plan.ok());
    PipelineInputs inputs(problem, 3);
    GlobalMemory::Clear();
    inputs.Allow();
    const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
    ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
    const auto mass = [&](int64_t offset, int32_t head, const SequenceGeometry& s) {
      const auto* lines = reinterpret_cast<const float*>(run.workspace() + offset) +
                          head * inputs.geometry.total_slots + s.slot_begin;
      return std::accumulate(lines, lines + s.k_len, 0.0);
    };
    for (const SequenceGeometry& s : inputs.geometry.sequences) {
      for (int32_t head = 0; head < 2; ++head) {
        EXPECT_NEAR(mass((*plan)->columns_at, head, s), 1, 1e-5);
        EXPECT_NEAR(mass((*plan)->diagonals_at, head, s), 1, 1e-5);
      }
    }
  }
}

// Queries of zeros are near their estimate. Queries that all read one key are not: the
// mean of its block does not show it.
TEST(FlexPrefillListsSpec, EachHeadChoosesHowItSelects) {
  constexpr int32_t kTokens = 640;
  const AttentionProblem problem{
      Shape(2, 1, 64, {{kTokens, kTokens}}),
      DType::kBF16,
      {.method = Method::kFlexPrefill, .gamma = 0.3f, .tau = 0.2f}};
  const auto plan = cuda::MakeCudaPlan(problem, {});
  ASSERT_TRUE(plan.ok());
  PipelineInputs inputs(problem, 3);
  for (int32_t row = 0; row < kTokens; ++row) {
    std::fill_n(inputs.q.data() + row * 64, 64, uint16_t{0});
    std::copy_n(inputs.k.data() + 200 * 64, 64, inputs.q.data() + (kTokens + row) * 64);
  }
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  const auto* by_grid =
      reinterpret_cast<const int32_t*>(run.workspace() + (*plan)->by_grid_at);
  EXPECT_EQ(by_grid[0], 1);
  EXPECT_EQ(by_grid[1], 0);
  AttentionReport report;
  ASSERT_TRUE(run.Report({.lists = true}, &report).ok());
  const auto decision = reference::Decide(problem, inputs.Tensors());
  EXPECT_EQ(report.lists.indices, decision.lists.indices);
}

// The published distance is NaN where a block has no mass, and NaN is not below tau.
// That of the paper is below 1 for any masses.
TEST(FlexPrefillListsSpec, ABlockWithoutMassMakesAHeadSelectByLinesAsPublished) {
  for (const bool as_published : {false, true}) {
    SCOPED_TRACE(as_published ? "as published" : "as in the paper");
    const AttentionProblem problem{Shape(1, 1, 64, {{640, 640}}),
                                   DType::kBF16,
                                   {.method = Method::kFlexPrefill,
                                    .as_published = as_published,
                                    .gamma = 0.3f,
                                    .tau = 1}};
    const auto plan = cuda::MakeCudaPlan(problem, {});
    ASSERT_TRUE(plan.ok());
    PipelineInputs inputs(problem, 3);
    std::fill_n(inputs.q.data(), inputs.q.bytes() / 2, ToBf16(6.0f).bits);
    // Logits of the second block are near -288, whose exponentials are 0 in f32.
    std::fill_n(inputs.k.data() + 128 * 64, 128 * 64, ToBf16(-6.0f).bits);
    GlobalMemory::Clear();
    inputs.Allow();
    const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
    ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
    const auto* columns =
        reinterpret_cast<const float*>(run.workspace() + (*plan)->columns_at);
    EXPECT_EQ(std::accumulate(columns + 128, columns + 256, 0.0), 0);
    const auto* by_grid =
        reinterpret_cast<const int32_t*>(run.workspace() + (*plan)->by_grid_at);
    EXPECT_EQ(by_grid[0], as_published ? 0 : 1);
    AttentionReport report;
    ASSERT_TRUE(run.Report({.lists = true}, &report).ok());
    const auto decision = reference::Decide(problem, inputs.Tensors());
    EXPECT_EQ(report.lists.indices, decision.lists.indices);
  }
}

}  // namespace
}  // namespace pbs::emulator
