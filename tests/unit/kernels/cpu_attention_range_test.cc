// Spec: pbs/attention.h, Run(). Logits at and past the ends of their range, for every
// table of the CPU backend.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include "tests/support/case_name.h"
#include "tests/unit/kernels/cpu_attention_fixture.h"

namespace pbs::cpu {
namespace {

using CpuAttentionRangeSpec = CpuAttentionSpec;

TEST_P(CpuAttentionRangeSpec, RefusesScoresThatOverflowAndStaysUsable) {
  AttentionProblem problem = MakeProblem(kShapes[7], DType::kF32, {});
  AttentionCase inputs(problem, 1);
  auto* q = reinterpret_cast<float*>(inputs.q_bytes().data());
  auto* k = reinterpret_cast<float*>(inputs.k_bytes().data());
  q[639 * 128] = 1e30f;
  k[5 * 128] = 1e30f;
  const BackendRun run = RunOn(attention_, problem, inputs.Tensors());
  EXPECT_EQ(run.status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(
      run.status.message(),
      "attention scores pass the largest f32, 3.4e38: products of q and k are too "
      "large");
  AttentionCase good(problem, 1);
  EXPECT_TRUE(RunOn(attention_, problem, good.Tensors()).status.ok());
}

// Neither the proxies nor a candidate block meet this pair.
TEST_P(CpuAttentionRangeSpec, RefusesAnOverflowThatOnlyAttentionMeets) {
  AttentionProblem problem = MakeProblem(kShapes[7], DType::kF32, {});
  for (float sign : {1.0f, -1.0f}) {
    AttentionCase inputs(problem, 1);
    reinterpret_cast<float*>(inputs.q_bytes().data())[0] = sign * 1e25f;
    reinterpret_cast<float*>(inputs.k_bytes().data())[0] = 1e25f;
    const BackendRun run = RunOn(attention_, problem, inputs.Tensors());
    EXPECT_EQ(run.status.code(), StatusCode::kInvalidArgument) << sign;
  }
}

TEST_P(CpuAttentionRangeSpec, NamesTheDtypeThatQueryHeadScopeRoundsScoresTo) {
  AttentionProblem problem = MakeProblem(kShapes[7], DType::kF16, {});
  problem.options.scope = Scope::kQueryHead;
  AttentionCase inputs(problem, 1);
  auto* q = reinterpret_cast<uint16_t*>(inputs.q_bytes().data());
  auto* k = reinterpret_cast<uint16_t*>(inputs.k_bytes().data());
  for (int d = 0; d < 128; ++d) {
    q[639 * 128 + d] = ToF16(24.0f).bits;
    k[5 * 128 + d] = ToF16(24.0f).bits;
  }
  const BackendRun run = RunOn(attention_, problem, inputs.Tensors());
  EXPECT_EQ(run.status.message(),
            "attention scores pass the largest f16, 65504, to which scope query_head "
            "rounds them; use scope kv_head, bf16 or smaller inputs");
  problem.options.scope = Scope::kKvHead;
  EXPECT_TRUE(RunOn(attention_, problem, inputs.Tensors()).status.ok());
}

TEST_P(CpuAttentionRangeSpec, LogitsOfAnyFiniteSizeFindTheirLargest) {
  for (float size : {1e3f, 2e4f, 65504.0f, 1e15f}) {
    AttentionProblem problem = MakeProblem({"", 1, 1, 64, {{2, 2}}}, DType::kF32, {});
    problem.options.method = Method::kDense;
    AttentionCase inputs(problem, 1);
    auto* q = reinterpret_cast<float*>(inputs.q_bytes().data());
    auto* k = reinterpret_cast<float*>(inputs.k_bytes().data());
    const auto* v = static_cast<const float*>(inputs.Tensors().v.data);
    std::fill_n(q, 128, size);
    std::fill_n(k, 64, 0.5f * size);
    std::fill_n(k + 64, 64, size);
    ASSERT_TRUE(RunOn(attention_, problem, inputs.Tensors()).status.ok());
    for (int32_t row = 0; row < 2; ++row) {
      EXPECT_TRUE(std::isfinite(inputs.Lse(0, row))) << size << " row " << row;
      for (int32_t d = 0; d < 64; ++d) {
        EXPECT_FLOAT_EQ(inputs.O(0, row, d), v[row * 64 + d])
            << "size " << size << " row " << row << " element " << d;
      }
    }
  }
}

// A NaN in V also reaches earlier rows of its tile (0 * NaN): pbs/attention.h.
TEST_P(CpuAttentionRangeSpec, NanInAQueryOrKeyReachesExactlyTheRowsThatSeeIt) {
  AttentionProblem problem = MakeProblem(kShapes[3], DType::kF32, {});
  problem.options.method = Method::kDense;
  AttentionCase inputs(problem, 1);
  auto* q = reinterpret_cast<float*>(inputs.q_bytes().data());
  auto* k = reinterpret_cast<float*>(inputs.k_bytes().data());
  q[50 * 64 + 3] = NAN;   // head 0, query 50
  k[200 * 64 + 3] = NAN;  // key 200, both heads
  ASSERT_TRUE(RunOn(attention_, problem, inputs.Tensors()).status.ok());
  for (int32_t head = 0; head < 2; ++head) {
    for (int64_t row = 0; row < 256; ++row) {
      const bool sees = row >= 200 || (head == 0 && row == 50);
      ASSERT_EQ(std::isnan(inputs.O(head, row, 0)), sees)
          << "head " << head << " row " << row;
      ASSERT_EQ(std::isnan(inputs.Lse(head, row)), sees)
          << "head " << head << " row " << row;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, CpuAttentionRangeSpec,
                         testing::ValuesIn(RunnableEngines()),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::cpu
