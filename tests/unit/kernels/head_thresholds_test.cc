// Spec: AttentionTensors::head_thresholds. A head with a threshold of its own is that
// head of a run in which every head has this threshold, on the CPU backend and in the
// reference.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/cpu_attention.h"
#include "tests/support/attention_matrix.h"

namespace pbs::cpu {
namespace {

using testing_support::AttentionCase;
using testing_support::BackendRun;
using testing_support::MatrixMethod;
using testing_support::MatrixMethods;
using testing_support::MatrixProblem;
using testing_support::MatrixShape;
using testing_support::MatrixShapes;

constexpr uint32_t kSeed = 41;

// Methods with a threshold. A fallback and a guard decide over several heads, or by
// rows that the thresholds do not change.
std::vector<MatrixMethod> ThresholdMethods() {
  std::vector<MatrixMethod> methods = MatrixMethods();
  std::erase_if(methods, [](const MatrixMethod& method) {
    return !HasThreshold(method.options.method) || method.options.dense_fallback;
  });
  return methods;
}

AttentionProblem WithHeadThresholds(AttentionProblem problem) {
  problem.has_head_thresholds = true;
  problem.options.threshold = 0.5f;  // has no effect
  return problem;
}

AttentionProblem WithThreshold(AttentionProblem problem, float threshold) {
  problem.options.threshold = threshold;
  return problem;
}

// The lists of one query head, row by row.
std::vector<std::vector<uint16_t>> ListsOfHead(const AttentionGeometry& g,
                                               const BlockLists& lists, int32_t head) {
  std::vector<std::vector<uint16_t>> rows;
  const BlockListsView view = lists.View();
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    for (int32_t i = 0; i < g.sequences[n].num_query_blocks; ++i) {
      const auto row = view.Row(g.ListRow(n, head, i));
      rows.emplace_back(row.begin(), row.end());
    }
  }
  return rows;
}

void ExpectSameOutput(const AttentionCase& ours, const AttentionCase& expected,
                      int32_t head) {
  for (int64_t query = 0; query < ours.geometry().total_q; ++query) {
    ASSERT_EQ(ours.Lse(head, query), expected.Lse(head, query)) << "query " << query;
    for (int32_t d = 0; d < ours.geometry().head_dim; ++d) {
      ASSERT_EQ(ours.O(head, query, d), expected.O(head, query, d))
          << query << " " << d;
    }
  }
}

class HeadThresholdsSpec : public testing::Test {
 protected:
  ThreadPool pool_{2};
  CpuAttention attention_{pool_, SupportedIsas().back(), false};
};

TEST_F(HeadThresholdsSpec, EachHeadIsThatOfARunWithItsThreshold) {
  for (const MatrixMethod& method : ThresholdMethods()) {
    for (const MatrixShape& shape : MatrixShapes()) {
      SCOPED_TRACE(method.name + " " + shape.name);
      const AttentionProblem problem =
          MatrixProblem(shape, DType::kF32, method.options);
      AttentionCase inputs(WithHeadThresholds(problem), kSeed);
      const AttentionTensors tensors = inputs.Tensors();
      const BackendRun run =
          testing_support::RunOn(attention_, inputs.problem(), tensors);
      ASSERT_TRUE(run.status.ok()) << run.status.ToString();
      for (int32_t head = 0; head < shape.num_heads; ++head) {
        AttentionCase alone(WithThreshold(problem, tensors.head_thresholds[head]),
                            kSeed);
        const BackendRun expected =
            testing_support::RunOn(attention_, alone.problem(), alone.Tensors());
        ASSERT_TRUE(expected.status.ok()) << expected.status.ToString();
        EXPECT_EQ(ListsOfHead(inputs.geometry(), run.report.lists, head),
                  ListsOfHead(alone.geometry(), expected.report.lists, head));
        EXPECT_EQ(run.report.heads.density[head], expected.report.heads.density[head]);
        ExpectSameOutput(inputs, alone, head);
      }
    }
  }
}

TEST_F(HeadThresholdsSpec, EachHeadOfTheReferenceIsThatOfARunWithItsThreshold) {
  for (const MatrixMethod& method : ThresholdMethods()) {
    const MatrixShape shape = MatrixShapes()[3];
    SCOPED_TRACE(method.name);
    const AttentionProblem problem = MatrixProblem(shape, DType::kF32, method.options);
    AttentionCase inputs(WithHeadThresholds(problem), kSeed);
    const AttentionTensors tensors = inputs.Tensors();
    const auto decision = reference::Decide(inputs.problem(), tensors);
    for (int32_t head = 0; head < shape.num_heads; ++head) {
      AttentionCase alone(WithThreshold(problem, tensors.head_thresholds[head]), kSeed);
      const auto expected = reference::Decide(alone.problem(), alone.Tensors());
      EXPECT_EQ(ListsOfHead(inputs.geometry(), decision.lists, head),
                ListsOfHead(alone.geometry(), expected.lists, head));
    }
  }
}

// An order head falls back when its heads together select nearly all blocks.
TEST_F(HeadThresholdsSpec, FallbackCountsTheListsOfTheHeadsOwnThresholds) {
  for (const float second : {0.2f, 1.0f}) {
    const MatrixShape shape = {"", 2, 1, 64, {{149, 149}}};
    AttentionOptions options = testing_support::SelectingMethods()[0].options;
    options.dense_fallback = true;
    AttentionCase inputs(WithHeadThresholds(MatrixProblem(shape, DType::kF32, options)),
                         kSeed);
    const std::vector<float> thresholds = {1, second};
    AttentionTensors tensors = inputs.Tensors();
    tensors.head_thresholds = thresholds;
    const BackendRun run =
        testing_support::RunOn(attention_, inputs.problem(), tensors);
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    const auto expected = reference::Run(inputs.problem(), tensors);
    testing_support::ExpectEqualStats(run.report.stats, expected.stats);
    EXPECT_EQ(run.report.stats.dense_fallback, second == 1.0f);
  }
}

TEST_F(HeadThresholdsSpec, AThresholdOfOneIsDense) {
  for (const MatrixMethod& method : ThresholdMethods()) {
    const MatrixShape shape = MatrixShapes()[0];
    SCOPED_TRACE(method.name);
    AttentionCase inputs(
        WithHeadThresholds(MatrixProblem(shape, DType::kF32, method.options)), kSeed);
    ASSERT_EQ(inputs.Tensors().head_thresholds[1], 1);
    const BackendRun run =
        testing_support::RunOn(attention_, inputs.problem(), inputs.Tensors());
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    EXPECT_DOUBLE_EQ(run.report.heads.density[1], 1);
    AttentionCase dense(
        MatrixProblem(shape, DType::kF32, {.method = Method::kDense, .block_size = 16}),
        kSeed);
    const auto expected = reference::Run(dense.problem(), dense.Tensors()).output;
    const double tolerance =
        testing_support::OutputTolerance(DType::kF32, false, shape.head_dim);
    for (int64_t query = 0; query < dense.geometry().total_q; ++query) {
      for (int32_t d = 0; d < shape.head_dim; ++d) {
        const int64_t at = (dense.geometry().total_q + query) * shape.head_dim + d;
        ASSERT_NEAR(inputs.O(1, query, d), expected.o[at], tolerance);
      }
    }
  }
}

struct BadThresholds {
  const char* name;
  std::vector<float> thresholds;
  const char* message;
};

TEST_F(HeadThresholdsSpec, RunRefusesThresholdsThatDoNotFitTheProblem) {
  for (const BadThresholds& c :
       {BadThresholds{"none", {}, "head_thresholds has 0 values; the problem has 2"},
        BadThresholds{
            "too_few", {0.5f}, "head_thresholds has 1 values; the problem has 2"},
        BadThresholds{
            "zero", {0.5f, 0.0f}, "head_thresholds[1] 0.000000 is outside (0, 1]"},
        BadThresholds{
            "above_one", {1.5f, 0.5f}, "head_thresholds[0] 1.500000 is outside (0, 1]"},
        BadThresholds{
            "nan", {NAN, 0.5f}, "head_thresholds[0] nan is outside (0, 1]"}}) {
    SCOPED_TRACE(c.name);
    const MatrixShape shape = MatrixShapes()[0];
    AttentionCase inputs(
        WithHeadThresholds(MatrixProblem(
            shape, DType::kF32, testing_support::SelectingMethods()[0].options)),
        kSeed);
    AttentionTensors tensors = inputs.Tensors();
    tensors.head_thresholds = c.thresholds;
    const BackendRun run =
        testing_support::RunOn(attention_, inputs.problem(), tensors);
    EXPECT_EQ(run.status.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(run.status.message(), c.message);
  }
}

TEST_F(HeadThresholdsSpec, RunRefusesThresholdsThatWereNotPlanned) {
  AttentionCase inputs(MatrixProblem(MatrixShapes()[0], DType::kF32,
                                     testing_support::SelectingMethods()[0].options),
                       kSeed);
  const std::vector<float> thresholds = {0.5f, 0.5f};
  AttentionTensors tensors = inputs.Tensors();
  tensors.head_thresholds = thresholds;
  EXPECT_EQ(
      testing_support::RunOn(attention_, inputs.problem(), tensors).status.message(),
      "head_thresholds has 2 values; the problem has 0");
}

}  // namespace
}  // namespace pbs::cpu
