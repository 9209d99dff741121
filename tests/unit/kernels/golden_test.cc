// Parity with the authors' own outputs (tests/golden/README.md): every PBS and mean
// pooling case on every table of the CPU backend.
//
//   f32        order and mask identical to theirs; output within 2e-5 of theirs and
//   2e-6
//              of our oracle
//   f16, bf16  mask identical given their order; output within 2e-3 / 4e-2 given their
//              order and mask; with our own order every moved key is a near tie
//
// Where a case must compute order or mask itself, it is not given them: the tensors are
// null, so using them would crash.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu_attention.h"
#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/support/attention_case.h"
#include "tests/support/golden_case.h"

namespace pbs::cpu {
namespace {

using testing_support::BackendRun;
using testing_support::GoldenCase;
using testing_support::GoldenCases;
using testing_support::RunOn;

// The report's packed order [heads, batch * len] as theirs [batch, heads, len].
std::vector<int32_t> AsBatch(const AttentionGeometry& g,
                             const std::vector<int32_t>& packed) {
  std::vector<int32_t> order;
  for (const SequenceGeometry& s : g.sequences) {
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      const auto begin = packed.begin() + head * g.total_k + s.k_begin;
      order.insert(order.end(), begin, begin + s.k_len);
    }
  }
  return order;
}

struct Moves {
  int64_t keys = 0;
  double gap_ulps = 0;  // largest score gap, in ulps of the input dtype at the score
};

// Compares two orders slot by slot under exact (unrounded) scores.
Moves CompareOrders(GoldenCase& golden, const std::vector<int32_t>& ours) {
  AttentionProblem exact = golden.problem;
  exact.dtype = DType::kF32;
  const AttentionTensors wide = golden.WideTensors();
  const AttentionGeometry g = MakeGeometry(golden.problem);
  const int mantissa = golden.problem.dtype == DType::kF16 ? 10 : 7;
  Moves moves;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    for (int32_t head = 0; head < g.num_heads; ++head) {
      const auto score = reference::KeyImportance(exact, wide, n, head);
      const int64_t at = (static_cast<int64_t>(n) * g.num_heads + head) * s.k_len;
      for (size_t slot = 0; slot < score.size(); ++slot) {
        const int32_t mine = ours[at + slot];
        const int32_t theirs = golden.order()[at + slot];
        if (mine == theirs) continue;
        ++moves.keys;
        const double larger = std::max(score[mine], score[theirs]);
        const double ulp = std::exp2(std::floor(std::log2(larger)) - mantissa);
        moves.gap_ulps =
            std::max(moves.gap_ulps, std::abs(score[mine] - score[theirs]) / ulp);
      }
    }
  }
  return moves;
}

// The oracle is slow and the same for every table: its answers are kept by case name.
const reference::Output& OracleOutput(GoldenCase& golden, reference::LogitSum sum) {
  static auto& kept =
      *new std::map<std::pair<std::string, reference::LogitSum>, reference::Output>;
  const auto key = std::pair(golden.name, sum);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  return kept[key] = reference::Attend(
             golden.problem, golden.Tensors(),
             reference::Decide(golden.problem, golden.Tensors()), sum);
}

class GoldenSpec : public testing::TestWithParam<Isa> {
 protected:
  BackendRun Run(GoldenCase& golden, const AttentionProblem& problem,
                 const AttentionTensors& tensors) {
    const BackendRun run = RunOn(attention_, problem, tensors);
    EXPECT_TRUE(run.status.ok()) << golden.name << ": " << run.status.ToString();
    return run;
  }

  ThreadPool pool_{2};
  CpuAttention attention_{pool_, GetParam(), GetParam() == Isa::kAvx512Bf16};
};

TEST_P(GoldenSpec, F32OrderMaskAndOutputAreTheAuthors) {
  std::vector<GoldenCase> cases = GoldenCases(/*f32=*/true);
  ASSERT_EQ(cases.size(), 8u);
  for (GoldenCase& golden : cases) {
    SCOPED_TRACE(golden.name);
    const BackendRun run = Run(golden, golden.problem, golden.Tensors());
    const AttentionGeometry g = MakeGeometry(golden.problem);
    if (golden.has_order()) {
      EXPECT_EQ(AsBatch(g, run.report.order), golden.order());
    }
    EXPECT_EQ(ExpandMask(g, run.report.lists.View()), golden.mask());
    EXPECT_NEAR(run.report.stats.CausalRatio(), golden.density(), 1e-6);
    if (golden.lower_density() > 0) {
      EXPECT_NEAR(run.report.stats.LowerDensity(), golden.lower_density(), 1e-6);
    }
    // Mean-pooling outputs are stored as f16: half an ulp of magnitude 4.
    const bool stored_as_f16 = golden.problem.options.method == Method::kMeanPooling;
    EXPECT_LE(golden.DistanceFromGolden(), stored_as_f16 ? 2e-3 : 2e-5);
    const double from_oracle =
        golden.DistanceFrom(OracleOutput(golden, reference::LogitSum::kF32));
    EXPECT_LE(from_oracle, 2e-6);
    // f64 logits: the rounding of f32 logits of magnitude up to 30 comes on top.
    const double from_f64 =
        golden.DistanceFrom(OracleOutput(golden, reference::LogitSum::kF64));
    EXPECT_LE(from_f64, 2e-5);
    std::printf("%-36s distance from theirs %.1e, f32 oracle %.2e, f64 oracle %.1e\n",
                golden.name.c_str(), golden.DistanceFromGolden(), from_oracle,
                from_f64);
  }
}

TEST_P(GoldenSpec, HalfPrecisionMasksAreTheAuthorsGivenTheirOrder) {
  std::vector<GoldenCase> cases = GoldenCases(/*f32=*/false);
  ASSERT_EQ(cases.size(), 6u);
  for (GoldenCase& golden : cases) {
    if (!golden.has_mask()) continue;  // the case that runs dense
    SCOPED_TRACE(golden.name);
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    golden.GiveOrder(problem, tensors);
    const BackendRun run = Run(golden, problem, tensors);
    EXPECT_EQ(ExpandMask(MakeGeometry(problem), run.report.lists.View()),
              golden.mask());
  }
}

TEST_P(GoldenSpec, HalfPrecisionOutputsAreTheAuthorsGivenTheirOrderAndMask) {
  for (GoldenCase& golden : GoldenCases(/*f32=*/false)) {
    SCOPED_TRACE(golden.name);
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    golden.GiveOrderAndMask(problem, tensors, lists);
    Run(golden, problem, tensors);
    const double distance = golden.DistanceFromGolden();
    EXPECT_LE(distance, golden.problem.dtype == DType::kF16 ? 2e-3 : 4e-2);
    std::printf("%-36s given order and mask: %.1e\n", golden.name.c_str(), distance);
  }
}

TEST_P(GoldenSpec, HalfPrecisionOrdersDifferOnlyOnNearTies) {
  for (GoldenCase& golden : GoldenCases(/*f32=*/false)) {
    if (!golden.has_order()) continue;
    SCOPED_TRACE(golden.name);
    const BackendRun run = Run(golden, golden.problem, golden.Tensors());
    const Moves moves =
        CompareOrders(golden, AsBatch(MakeGeometry(golden.problem), run.report.order));
    std::printf("%-36s own order: %ld keys moved, largest score gap %.2f ulp\n",
                golden.name.c_str(), static_cast<long>(moves.keys), moves.gap_ulps);
    EXPECT_LE(moves.gap_ulps, 1.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, GoldenSpec, testing::ValuesIn(SupportedIsas()),
                         [](const auto& table) { return IsaName(table.param); });

}  // namespace
}  // namespace pbs::cpu
