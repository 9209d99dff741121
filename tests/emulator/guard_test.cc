// Spec: cuda/selection/guard_heads.h, in whole runs against kernels/reference.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <set>
#include <vector>

#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

struct GuardCase {
  const char* name;
  AttentionShape shape;
  AttentionOptions options;  // coverage_min is chosen
};

void PrintTo(const GuardCase& c, std::ostream* out) { *out << c.name; }

constexpr uint32_t kSeed = 4;

// Runs the problem; its outputs are in `inputs`.
void Attend(const AttentionProblem& problem, PipelineInputs& inputs,
            AttentionReport* report) {
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), kSeed);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  const Status status = run.Report({.order = true, .lists = true}, report);
  ASSERT_TRUE(status.ok()) << status.ToString();
}

std::vector<uint16_t> OutputsOf(const PipelineInputs& inputs) {
  return {inputs.o.data(), inputs.o.data() + inputs.o.bytes() / 2};
}

class GuardSpec : public testing::TestWithParam<GuardCase> {};

// A bound between the coverages of the heads in the middle guards half of them.
TEST_P(GuardSpec, HeadsThatKeepTooLittleReadEveryBlockAndAreNamed) {
  AttentionProblem problem = {GetParam().shape, DType::kBF16, GetParam().options};
  PipelineInputs inputs(problem, kSeed);
  inputs.MakeBlocksDiffer(problem, kSeed);
  AttentionReport free;
  ASSERT_NO_FATAL_FAILURE(Attend(problem, inputs, &free));
  EXPECT_TRUE(free.heads.guarded.empty());
  const std::vector<uint16_t> free_outputs = OutputsOf(inputs);
  std::vector<double> sorted = free.heads.coverage;
  std::sort(sorted.begin(), sorted.end());
  const size_t half = sorted.size() / 2;
  ASSERT_LT(sorted[half - 1] + 1e-4, sorted[half]);
  problem.options.coverage_min =
      static_cast<float>((sorted[half - 1] + sorted[half]) / 2);

  AttentionReport guarded;
  ASSERT_NO_FATAL_FAILURE(Attend(problem, inputs, &guarded));
  const reference::Decision expected = reference::Decide(problem, inputs.Tensors());
  EXPECT_EQ(
      std::set<int32_t>(guarded.heads.guarded.begin(), guarded.heads.guarded.end()),
      expected.guarded_heads);
  EXPECT_FALSE(guarded.heads.guarded.empty());
  const AttentionGeometry& g = inputs.geometry;
  EXPECT_EQ(ExpandMask(g, guarded.lists.View()), ExpandMask(g, expected.lists.View()));
  EXPECT_EQ(guarded.order, free.order);
  const int64_t of_head = g.total_q * g.head_dim;
  for (int32_t head = 0; head < g.num_heads; ++head) {
    SCOPED_TRACE(testing::Message() << "head " << head);
    const bool is_guarded = expected.guarded_heads.contains(head);
    if (is_guarded) {
      EXPECT_GT(guarded.heads.coverage[head], free.heads.coverage[head]);
      EXPECT_GT(guarded.heads.density[head], free.heads.density[head]);
      continue;
    }
    EXPECT_EQ(guarded.heads.coverage[head], free.heads.coverage[head]);
    EXPECT_EQ(guarded.heads.density[head], free.heads.density[head]);
    EXPECT_TRUE(std::equal(free_outputs.begin() + head * of_head,
                           free_outputs.begin() + (head + 1) * of_head,
                           inputs.o.data() + head * of_head));
  }
  EXPECT_NEAR(guarded.stats.coverage,
              reference::Coverage(problem, inputs.Tensors(), expected), 2e-5);
}

AttentionOptions Few(Method method, bool permute = false) {
  AttentionOptions options = DefaultOptions(method);
  options.threshold = method == Method::kFlashPrefill ? options.threshold : 0.3f;
  options.alpha = method == Method::kFlashPrefill ? 0.5f : options.alpha;
  options.permute = permute;
  options.coverage_rows = 5;
  return options;
}

AttentionOptions WithFallback(AttentionOptions options) {
  options.dense_fallback = true;
  return options;
}

INSTANTIATE_TEST_SUITE_P(
    Cases, GuardSpec,
    testing::Values(
        GuardCase{"mean_pooling", {4, 2, 64, {{900, 900}}}, Few(Method::kMeanPooling)},
        GuardCase{"sorted_keys", {4, 2, 64, {{140, 1000}}}, Few(Method::kPbs)},
        // Of two sequences that run sparse; the others have nothing to guard.
        GuardCase{"batch",
                  {4, 2, 64, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}},
                  Few(Method::kPbs)},
        GuardCase{"xattention_of_sorted_keys",
                  {4, 2, 64, {{300, 800}}},
                  Few(Method::kXAttention, /*permute=*/true)},
        GuardCase{
            "flashprefill", {4, 2, 64, {{300, 900}}}, Few(Method::kFlashPrefill)}),
    testing_support::CaseName());

// A guarded head reads every block, which a fallback then may do for its whole order
// head. Coverage is that of what ran.
TEST(GuardedReportSpec, AHeadThatFallsBackAfterTheGuardHasAllCoverage) {
  AttentionProblem problem = {
      {2, 2, 64, {{600, 600}}}, DType::kBF16, WithFallback(Few(Method::kPbs))};
  problem.options.coverage_min = 1;
  PipelineInputs inputs(problem, kSeed);
  AttentionReport report;
  ASSERT_NO_FATAL_FAILURE(Attend(problem, inputs, &report));
  EXPECT_EQ(report.heads.guarded, (std::vector<int32_t>{0, 1}));
  EXPECT_TRUE(report.stats.dense_fallback);
  EXPECT_EQ(report.stats.method_run, Method::kDense);
  EXPECT_EQ(report.stats.coverage, 1);
  EXPECT_EQ(report.stats.Density(), 1);
}

}  // namespace
}  // namespace pbs::emulator
