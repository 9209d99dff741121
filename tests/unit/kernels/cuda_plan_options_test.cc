// Spec: cuda/plan/cuda_plan.h, what single options add to a plan. No device.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>

#include "cuda/plan/cuda_plan.h"

namespace pbs::cuda {
namespace {

constexpr DeviceTraits kDevice;

AttentionProblem Problem(int32_t tokens, const AttentionOptions& options = {}) {
  return {{32, 8, 128, {{tokens, tokens}}}, DType::kBF16, options};
}

TEST(PlannedOptionsSpec, MeanCorrectionTakesTwoMeansOfABlockAndAnLse) {
  const auto added = [](AttentionProblem problem) {
    const auto plain = MakeCudaPlan(problem, kDevice);
    problem.options.mean_correction = true;
    const auto corrected = MakeCudaPlan(problem, kDevice);
    EXPECT_TRUE(plain.ok() && corrected.ok());
    EXPECT_FALSE((*plain)->corrects);
    return (*corrected)->workspace_bytes - (*plain)->workspace_bytes;
  };
  constexpr int32_t kTokens = 4096;
  constexpr int64_t kBlocks = kTokens / 128;
  constexpr int64_t kLse = 4 * 32 * kTokens;
  AttentionOptions query_head = {.scope = Scope::kQueryHead};
  const AttentionOptions in_place = {.method = Method::kMeanPooling};
  EXPECT_EQ(added(Problem(kTokens)), 2 * 8 * kBlocks * 128 * 2 + kLse);
  EXPECT_EQ(added(Problem(kTokens, in_place)), 2 * 8 * kBlocks * 128 * 2 + kLse);
  EXPECT_EQ(added(Problem(kTokens, query_head)), 2 * 32 * kBlocks * 128 * 2 + kLse);
  // Every block is read.
  EXPECT_EQ(added(Problem(256)), 0);
}

TEST(PlannedOptionsSpec, TheCorrectionGoesOnFromTheLseThatAttentionWrites) {
  const auto plan = MakeCudaPlan(Problem(1000, {.mean_correction = true}), kDevice);
  ASSERT_TRUE(plan.ok());
  alignas(256) static std::byte memory[256];
  alignas(256) static float lse[1];
  AttentionTensors tensors;
  tensors.q = tensors.k = tensors.v = {memory, PackedLayout(1000, 128)};
  tensors.o = {memory, PackedLayout(1000, 128)};
  const Workspace workspace{memory, (*plan)->workspace_bytes};  // not touched here
  const auto unwanted = MakeRunParams(**plan, tensors, workspace);
  ASSERT_TRUE(unwanted.ok());
  EXPECT_EQ(static_cast<void*>(unwanted->attention.lse), memory + (*plan)->lse_at);
  EXPECT_EQ(unwanted->correction.attention.lse, unwanted->attention.lse);
  EXPECT_EQ(unwanted->attention.lse_strides.head, 1000);
  // Attention has sorted the keys.
  EXPECT_EQ(unwanted->correction.k, unwanted->k);
  EXPECT_EQ(unwanted->correction.v, unwanted->v);
  tensors.lse = {lse, PackedLayout(1000, 1)};
  const auto wanted = MakeRunParams(**plan, tensors, workspace);
  ASSERT_TRUE(wanted.ok());
  EXPECT_EQ(wanted->attention.lse, lse);
  EXPECT_EQ(wanted->correction.attention.lse, lse);
}

TEST(PlannedOptionsSpec, TheGuardTakesAFlagOfAHeadAndSequenceWhereBlocksAreSelected) {
  const auto added = [](int32_t tokens, AttentionOptions options) {
    options.coverage_rows = 8;
    const auto free = MakeCudaPlan(Problem(tokens, options), kDevice);
    options.coverage_min = 0.5f;
    const auto guarded = MakeCudaPlan(Problem(tokens, options), kDevice);
    EXPECT_TRUE(free.ok() && guarded.ok());
    EXPECT_FALSE((*free)->guards());
    EXPECT_EQ((*guarded)->guards(), (*guarded)->selects);
    return (*guarded)->summary_bytes - (*free)->summary_bytes;
  };
  EXPECT_EQ(added(4096, {}), 256);  // 32 flags of four bytes
  EXPECT_EQ(added(4096, {.method = Method::kMeanPooling}), 256);
  EXPECT_EQ(added(256, {}), 0);  // every block is read
}

}  // namespace
}  // namespace pbs::cuda
