// Spec: AttentionStats. Densities are shares of what dense attention computes on the
// same tiles; the causal ratio is what published densities count.
#include <gtest/gtest.h>
#include <cstdint>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/unit/kernels/cpu_attention_fixture.h"

namespace pbs::cpu {
namespace {

struct DensityCase {
  const char* name;
  std::vector<SequenceShape> sequences;
  AttentionOptions options;
  // Of one head, by hand: blocks of 128, segments of 256.
  int64_t executed, dense, causal;
};

AttentionOptions Dense() { return {.method = Method::kDense}; }
AttentionOptions Pbs(float threshold) { return {.threshold = threshold}; }
AttentionOptions Fallback() { return {.threshold = 1, .dense_fallback = true}; }
AttentionOptions Pooling() { return {.method = Method::kMeanPooling, .threshold = 1}; }

class DensitySpec : public testing::TestWithParam<DensityCase> {};

TEST_P(DensitySpec, IsTheShareOfWhatDenseAttentionComputesOnTheSameTiles) {
  const DensityCase& c = GetParam();
  for (Scope scope : {Scope::kKvHead, Scope::kQueryHead}) {
    AttentionOptions options = c.options;
    if (Permutes(options)) options.scope = scope;
    constexpr int32_t kHeads = 4;
    const AttentionProblem problem =
        MakeProblem({c.name, kHeads, 2, 32, c.sequences}, DType::kF32, options);
    AttentionCase inputs(problem, /*seed=*/3);
    ThreadPool pool(1);
    CpuAttention attention(pool, Isa::kScalar, false);
    const BackendRun run = RunOn(attention, problem, inputs.Tensors());
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    const AttentionStats& stats = run.report.stats;
    EXPECT_EQ(stats.executed_blocks, kHeads * c.executed);
    EXPECT_EQ(stats.dense_blocks, kHeads * c.dense);
    EXPECT_EQ(stats.causal_blocks, kHeads * c.causal);
    const auto ratio = [](int64_t part, int64_t whole) {
      return whole == 0 ? 1.0 : static_cast<double>(part) / static_cast<double>(whole);
    };
    EXPECT_DOUBLE_EQ(stats.Density(), ratio(c.executed, c.dense));
    EXPECT_DOUBLE_EQ(stats.CausalRatio(), ratio(c.executed, c.causal));
    EXPECT_DOUBLE_EQ(stats.executed_flops, stats.Density() * stats.dense_flops);
    EXPECT_EQ(run.report.heads.density,
              std::vector<double>(kHeads, ratio(c.executed, c.dense)));
    EXPECT_LE(stats.LowerDensity(), 1);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, DensitySpec,
    testing::Values(
        DensityCase{"dense_of_300_tokens", {{300, 300}}, Dense(), 6, 6, 6},
        DensityCase{"pbs_inside_one_segment", {{200, 200}}, Pbs(0.5f), 3, 3, 3},
        DensityCase{"all_of_300_tokens", {{300, 300}}, Pbs(1), 7, 7, 6},
        DensityCase{"all_of_two_segments", {{512, 512}}, Pbs(1), 12, 12, 10},
        DensityCase{"all_of_4096_tokens", {{4096, 4096}}, Pbs(1), 544, 544, 528},
        DensityCase{"mean_pooling_of_all", {{512, 512}}, Pooling(), 10, 10, 10},
        DensityCase{"fallen_back", {{512, 512}}, Fallback(), 10, 10, 10},
        DensityCase{"last_query_of_777_keys", {{1, 777}}, Pbs(1), 7, 7, 7},
        DensityCase{"queries_from_inside_a_segment", {{300, 777}}, Pbs(1), 23, 23, 22},
        DensityCase{"short_beside_long", {{200, 200}, {512, 512}}, Pbs(1), 15, 15, 13},
        DensityCase{"no_query", {{0, 512}}, Pbs(1), 0, 0, 0}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::cpu
