// Spec: cuda/selection/measure_coverage.h, in whole runs against kernels/reference.
#include <gtest/gtest.h>

#include <vector>

#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

using Layout = PipelineInputs::Layout;

// Logits of up to some 20 from f32 products of 16-bit values, and their exponentials by
// a base-2 approximation: 1e-5 of each weight, of numerator and denominator.
constexpr double kCoverageErrorMax = 2e-5;

struct CoverageCase {
  const char* name;
  AttentionShape shape;
  AttentionOptions options;
  Layout layout = Layout::kPacked;
  DType dtype = DType::kBF16;
};

void PrintTo(const CoverageCase& c, std::ostream* out) { *out << c.name; }

class CoverageSpec : public testing::TestWithParam<CoverageCase> {};

template <class Element, int kHeadDim>
void CheckCoverage(const CoverageCase& c) {
  const AttentionProblem problem = {c.shape, c.dtype, c.options};
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  PipelineInputs inputs(problem, 3, c.layout);
  GlobalMemory::Clear();
  inputs.Allow();
  const AttentionTensors tensors = inputs.Tensors();
  const PipelineRun<Element, kHeadDim> run(**plan, tensors, 1);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  AttentionReport report;
  ASSERT_TRUE(run.Report({.order = true, .lists = true}, &report).ok());
  const reference::Decision decision = reference::DecisionOf(report);
  const double expected = reference::Coverage(problem, tensors, decision);
  EXPECT_NEAR(report.stats.coverage, expected, kCoverageErrorMax);
  int64_t rows = 0;
  for (const SequenceShape& s : c.shape.sequences) {
    rows += c.shape.num_heads * std::min(c.options.coverage_rows, s.q_len);
  }
  EXPECT_EQ(report.stats.coverage_rows, rows);
  EXPECT_GT(report.stats.coverage, 0.1);
  EXPECT_LT(report.stats.coverage, 0.999);
}

TEST_P(CoverageSpec, IsTheShareOfTheExactMassInTheBlocksThatRan) {
  const CoverageCase& c = GetParam();
  if (c.dtype == DType::kF16) {
    CheckCoverage<cuda::F16Element, 64>(c);
  } else if (c.shape.head_dim == 96) {
    CheckCoverage<cuda::Bf16Element, 96>(c);
  } else if (c.shape.head_dim == 128) {
    CheckCoverage<cuda::Bf16Element, 128>(c);
  } else if (c.shape.head_dim == 256) {
    CheckCoverage<cuda::Bf16Element, 256>(c);
  } else {
    CheckCoverage<cuda::Bf16Element, 64>(c);
  }
}

// Few queries behind many keys: what the emulator can afford.
const std::vector<SequenceShape> kOne = {{150, 700}};
const std::vector<SequenceShape> kBatch = {{130, 600}, {5, 520}, {90, 90}, {0, 300}};

INSTANTIATE_TEST_SUITE_P(
    Cases, CoverageSpec,
    testing::Values(
        CoverageCase{"pbs", {2, 1, 64, kOne}, {.threshold = 0.3f, .coverage_rows = 10}},
        CoverageCase{
            "one_row", {1, 1, 64, kOne}, {.threshold = 0.3f, .coverage_rows = 1}},
        CoverageCase{"as_many_rows_as_together",
                     {1, 1, 64, kOne},
                     {.threshold = 0.3f, .coverage_rows = 8}},
        CoverageCase{
            "mean_pooling",
            {4, 2, 64, {{150, 600}}},
            {.method = Method::kMeanPooling, .threshold = 0.3f, .coverage_rows = 9}},
        CoverageCase{"batch_with_offsets_and_short_prompts",
                     {2, 1, 64, kBatch},
                     {.threshold = 0.3f, .coverage_rows = 6}},
        CoverageCase{"strided",
                     {2, 1, 64, kBatch},
                     {.threshold = 0.3f, .coverage_rows = 6},
                     Layout::kStrided},
        CoverageCase{
            "strided_and_pooled",
            {2, 2, 64, kBatch},
            {.method = Method::kMeanPooling, .threshold = 0.3f, .coverage_rows = 6},
            Layout::kStrided},
        CoverageCase{
            "query_heads",
            {4, 2, 64, {{20, 520}}},
            {.threshold = 0.3f, .scope = Scope::kQueryHead, .coverage_rows = 3}},
        CoverageCase{"head_dim_96",
                     {1, 1, 96, {{20, 520}}},
                     {.threshold = 0.3f, .coverage_rows = 5}},
        CoverageCase{"head_dim_128",
                     {1, 1, 128, {{20, 520}}},
                     {.threshold = 0.3f, .coverage_rows = 5}},
        CoverageCase{"head_dim_256",
                     {1, 1, 256, {{20, 520}}},
                     {.threshold = 0.3f, .coverage_rows = 5}},
        CoverageCase{"f16",
                     {1, 1, 64, {{40, 520}}},
                     {.threshold = 0.3f, .coverage_rows = 7},
                     Layout::kPacked,
                     DType::kF16},
        CoverageCase{"more_rows_than_queries",
                     {1, 1, 64, {{3, 520}}},
                     {.threshold = 0.3f, .coverage_rows = 1024}}),
    testing_support::CaseName());

// Whatever runs dense holds all of the mass, told without a kernel or by the flag.
TEST(DenseCoverageSpec, IsOne) {
  for (const AttentionOptions& options :
       {AttentionOptions{.method = Method::kDense, .coverage_rows = 4},
        AttentionOptions{.threshold = 1, .dense_fallback = true, .coverage_rows = 4}}) {
    const AttentionProblem problem = {
        {2, 1, 64, {{10, 300}, {5, 90}}}, DType::kBF16, options};
    const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    PipelineInputs inputs(problem, 3);
    GlobalMemory::Clear();
    inputs.Allow();
    const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
    ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
    AttentionReport report;
    ASSERT_TRUE(run.Report({}, &report).ok());
    EXPECT_EQ(report.stats.coverage, 1);
    EXPECT_EQ(report.stats.coverage_rows, 2 * (4 + 4));
    EXPECT_EQ(report.stats.method_run, Method::kDense);
  }
}

}  // namespace
}  // namespace pbs::emulator
