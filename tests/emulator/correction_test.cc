// Spec: the mean correction of cuda/attention, in whole runs against kernels/reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <ostream>
#include <vector>

#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/support/case_name.h"
#include "tests/support/largest_error.h"
#include "tests/support/tolerances.h"

namespace pbs::emulator {
namespace {

using Layout = PipelineInputs::Layout;

struct CorrectionCase {
  const char* name;
  AttentionShape shape;
  AttentionOptions options;
  Layout layout = Layout::kPacked;
};

void PrintTo(const CorrectionCase& c, std::ostream* out) { *out << c.name; }

AttentionProblem ProblemOf(const CorrectionCase& c, DType dtype) {
  AttentionProblem problem = {c.shape, dtype, c.options};
  problem.options.mean_correction = true;
  return problem;
}

// Runs the problem; `report` may be null.
template <class Element, int kHeadDim>
void RunPipeline(const AttentionProblem& problem, PipelineInputs& inputs,
                 const AttentionTensors& tensors, uint32_t seed,
                 AttentionReport* report) {
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<Element, kHeadDim> run(**plan, tensors, seed);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  if (report == nullptr) return;
  const Status status = run.Report({.order = true, .lists = true}, report);
  ASSERT_TRUE(status.ok()) << status.ToString();
}

class CorrectionSpec : public testing::TestWithParam<CorrectionCase> {
 protected:
  template <class Element, int kHeadDim>
  void Check(DType dtype, uint32_t seed) {
    const AttentionProblem problem = ProblemOf(GetParam(), dtype);
    PipelineInputs inputs(problem, seed, GetParam().layout);
    inputs.MakeBlocksDiffer(problem, seed);
    const AttentionTensors tensors = inputs.Tensors();
    AttentionReport report;
    ASSERT_NO_FATAL_FAILURE(
        (RunPipeline<Element, kHeadDim>(problem, inputs, tensors, seed, &report)));
    const reference::Output exact =
        reference::Attend(problem, tensors, reference::DecisionOf(report));
    ExpectOutputs(problem, inputs, exact);
  }

 private:
  static void ExpectOutputs(const AttentionProblem& problem,
                            const PipelineInputs& inputs,
                            const reference::Output& exact) {
    const AttentionGeometry& g = inputs.geometry;
    double o_error = 0;
    double lse_error = 0;
    for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
      const SequenceGeometry& s = g.sequences[n];
      for (int32_t head = 0; head < g.num_heads; ++head) {
        for (int32_t row = 0; row < s.q_len; ++row) {
          const int64_t exact_row = head * g.total_q + s.q_begin + row;
          const int64_t at = inputs.q_layout.Offset(n, s.q_begin, head, row);
          for (int32_t d = 0; d < g.head_dim; ++d) {
            const uint16_t bits = inputs.o.data()[at + d];
            const float o = problem.dtype == DType::kBF16 ? ToFloat(bf16{bits})
                                                          : ToFloat(f16{bits});
            o_error = testing_support::LargerError(
                o_error, std::abs(o - exact.o[exact_row * g.head_dim + d]));
          }
          lse_error = testing_support::LargerError(
              lse_error, std::abs(inputs.lse.data()[exact_row] - exact.lse[exact_row]));
        }
      }
    }
    EXPECT_LE(o_error, problem.dtype == DType::kBF16 ? 3e-2 : 4e-3);
    EXPECT_LE(lse_error,
              testing_support::LseTolerance(problem.dtype, /*corrects=*/true));
  }
};

TEST_P(CorrectionSpec, EqualsTheReference) {
  for (uint32_t seed : {1u, 2u}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    if (GetParam().shape.head_dim == 64) {
      Check<cuda::Bf16Element, 64>(DType::kBF16, seed);
    } else if (GetParam().shape.head_dim == 128) {
      Check<cuda::F16Element, 128>(DType::kF16, seed);
    } else {
      Check<cuda::Bf16Element, 256>(DType::kBF16, seed);
    }
  }
}

constexpr AttentionOptions kFewBlocks = {
    .method = Method::kMeanPooling, .threshold = 0.1f, .force_first_block = false};
constexpr AttentionOptions kFewSorted = {.threshold = 0.1f, .force_first_block = false};

INSTANTIATE_TEST_SUITE_P(
    Cases, CorrectionSpec,
    testing::Values(
        CorrectionCase{"one_prompt", {2, 1, 64, {{900, 900}}}, kFewBlocks},
        // Three steps of means.
        CorrectionCase{"many_blocks", {2, 2, 64, {{140, 8500}}}, kFewBlocks},
        CorrectionCase{"batch",
                       {4, 2, 64, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}},
                       kFewBlocks},
        CorrectionCase{"strided_batch_of_sorted_keys",
                       {4, 2, 64, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}},
                       kFewSorted,
                       Layout::kStrided},
        CorrectionCase{"sorted_keys_of_every_head",
                       {4, 2, 64, {{600, 900}}},
                       {.threshold = 0.1f,
                        .scope = Scope::kQueryHead,
                        .force_first_block = false}},
        CorrectionCase{"long_segments",
                       {2, 1, 128, {{300, 1300}}},
                       {.segment_size = 384, .threshold = 0.1f}},
        CorrectionCase{"head_dim_128", {2, 1, 128, {{300, 900}}}, kFewBlocks},
        // Two thread blocks share a tile.
        CorrectionCase{"head_dim_256", {2, 1, 256, {{200, 700}}}, kFewBlocks},
        CorrectionCase{
            "head_dim_256_of_sorted_keys", {1, 1, 256, {{70, 850}}}, kFewSorted}),
    testing_support::CaseName());

std::vector<uint16_t> OutputsOf(const PipelineInputs& inputs) {
  return {inputs.o.data(), inputs.o.data() + inputs.o.bytes() / 2};
}

// It goes on from an LSE, which then lies in the workspace.
TEST(CorrectionOutputsSpec, AreTheSameForACallerWhoWantsNoLse) {
  const AttentionProblem problem =
      ProblemOf({"", {2, 1, 64, {{300, 700}, {140, 400}}}, kFewBlocks}, DType::kBF16);
  PipelineInputs inputs(problem, 3);
  AttentionTensors tensors = inputs.Tensors();
  RunPipeline<cuda::Bf16Element, 64>(problem, inputs, tensors, 1, nullptr);
  const std::vector<uint16_t> expected = OutputsOf(inputs);
  tensors.lse = {};
  RunPipeline<cuda::Bf16Element, 64>(problem, inputs, tensors, 2, nullptr);
  EXPECT_EQ(OutputsOf(inputs), expected);
}

TEST(CorrectionOutputsSpec, AreThoseOfAttentionWhereAHeadFallsBackToDense) {
  AttentionProblem problem = ProblemOf(
      {"", {2, 1, 64, {{700, 700}}}, {.threshold = 1, .dense_fallback = true}},
      DType::kBF16);
  PipelineInputs inputs(problem, 3);
  AttentionReport report;
  RunPipeline<cuda::Bf16Element, 64>(problem, inputs, inputs.Tensors(), 1, &report);
  EXPECT_TRUE(report.stats.dense_fallback);
  const std::vector<uint16_t> corrected = OutputsOf(inputs);
  problem.options.mean_correction = false;
  RunPipeline<cuda::Bf16Element, 64>(problem, inputs, inputs.Tensors(), 1, nullptr);
  EXPECT_EQ(OutputsOf(inputs), corrected);
}

TEST(CorrectionOutputsSpec, OfANeighbourOfBadRowsKeepTheirBits) {
  for (const AttentionOptions& options : {kFewBlocks, kFewSorted}) {
    for (const Layout layout : {Layout::kPacked, Layout::kStrided}) {
      SCOPED_TRACE(testing::Message()
                   << MethodName(options.method)
                   << (layout == Layout::kPacked ? ", packed" : ", strided"));
      const AttentionProblem problem = ProblemOf(
          {"", {2, 1, 64, {{20, 700}, {30, 530}, {40, 600}}}, options}, DType::kBF16);
      PipelineInputs inputs(problem, 5, layout);
      RunPipeline<cuda::Bf16Element, 64>(problem, inputs, inputs.Tensors(), 1, nullptr);
      const std::vector<uint16_t> clean = OutputsOf(inputs);
      inputs.Spoil(1);
      RunPipeline<cuda::Bf16Element, 64>(problem, inputs, inputs.Tensors(), 1, nullptr);
      const AttentionGeometry& g = inputs.geometry;
      for (const int32_t n : {0, 2}) {
        const SequenceGeometry& s = g.sequences[n];
        for (int32_t head = 0; head < g.num_heads; ++head) {
          for (int32_t row = 0; row < s.q_len; ++row) {
            const int64_t at = inputs.q_layout.Offset(n, s.q_begin, head, row);
            for (int32_t d = 0; d < g.head_dim; ++d) {
              ASSERT_EQ(inputs.o.data()[at + d], clean[at + d])
                  << "sequence " << n << ", head " << head << ", row " << row;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pbs::emulator
