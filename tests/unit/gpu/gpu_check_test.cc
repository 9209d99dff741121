// Spec: tests/gpu/check_run.h and check_cases.h: what is said of wrong outputs, and
// what cases there are.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "cuda/attention/sm90_barrier_names.h"
#include "pbs/dtype.h"
#include "reference/reference_attention.h"
#include "tests/gpu/check.h"

namespace pbs::gpu {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class MismatchSpec : public testing::Test {
 protected:
  MismatchSpec() {
    case_.problem = {
        {2, 1, 128, {{40, 40}, {150, 300}}}, DType::kBF16, {.method = Method::kDense}};
    inputs_ = std::make_unique<Inputs>(case_);
    const auto exact = reference::Run(case_.problem, inputs_->HostTensors());
    outputs_.report.order = exact.decision.order;
    outputs_.report.lists = exact.decision.lists;
    for (const double x : exact.output.o) {
      outputs_.o.push_back(ToBf16(static_cast<float>(x)).bits);
    }
    outputs_.lse.assign(exact.output.lse.begin(), exact.output.lse.end());
  }

  uint16_t& Output(int32_t head, int32_t row_of_all, int32_t column) {
    return outputs_.o[static_cast<size_t>((head * 190 + row_of_all) * 128 + column)];
  }

  Case case_;
  std::unique_ptr<Inputs> inputs_;
  Outputs outputs_;
};

TEST_F(MismatchSpec, RightOutputsAreRight) {
  const Verdict verdict = Judge(case_, *inputs_, outputs_);
  EXPECT_TRUE(verdict.right);
  EXPECT_EQ(verdict.mismatches.wrong, 0);
  EXPECT_EQ(verdict.mismatches.outputs, 2 * 190 * 128);
}

TEST_F(MismatchSpec, CountsWrongOutputsByTheirPlaceInTheTile) {
  // Row 33 of sequence 1 has position 183, which is row 55 of its tile.
  Output(1, 40 + 33, 64) = ToBf16(9).bits;
  Output(1, 40 + 33, 127) = ToBf16(-9).bits;
  // Position 195: row 67.
  Output(1, 40 + 45, 3) = 0x7FFF;
  outputs_.lse[190 + 40 + 45] = 99;
  const Verdict verdict = Judge(case_, *inputs_, outputs_);
  EXPECT_FALSE(verdict.right);
  const Mismatches& found = verdict.mismatches;
  EXPECT_EQ(found.wrong, 3);
  EXPECT_EQ(found.wrong_lse, 1);
  EXPECT_EQ(found.first.sequence, 1);
  EXPECT_EQ(found.first.head, 1);
  EXPECT_EQ(found.first.row, 33);
  EXPECT_EQ(found.first.column, 64);
  EXPECT_EQ(found.got, 9);
  EXPECT_THAT(found.by_half, ElementsAre(2, 1));
  EXPECT_THAT(found.by_row_mod_8, ElementsAre(0, 0, 0, 1, 0, 0, 0, 2));
  EXPECT_THAT(found.by_panel, ElementsAre(1, 2));
  EXPECT_THAT(found.ToJson().ToString(), HasSubstr("\"by_half\": [2, 1]"));
}

TEST_F(MismatchSpec, APoisonedSequenceIsNotJudgedAndNothingElseIsLeftOut) {
  case_.poisoned = 0;
  Output(0, 7, 7) = 0x7FFF;
  EXPECT_TRUE(Judge(case_, *inputs_, outputs_).right);
  Output(0, 47, 7) = 0x7FFF;
  EXPECT_EQ(Judge(case_, *inputs_, outputs_).mismatches.wrong, 1);
}

TEST(CasesSpec, PoisonIsInOneSequenceOfEveryOperandAndNowhereElse) {
  for (const Case& c : TableCases(1)) {
    if (c.poisoned < 0) continue;
    SCOPED_TRACE(c.name);
    const Inputs clean(c);
    const Inputs poisoned = clean.Poisoned(c.poisoned);
    const auto& s = clean.geometry.sequences[static_cast<size_t>(c.poisoned)];
    const auto changed = [](const auto& a, const auto& b) {
      int64_t count = 0;
      for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i] ? 1 : 0;
      return count;
    };
    const int32_t dim = clean.geometry.head_dim;
    EXPECT_EQ(changed(clean.q, poisoned.q), int64_t{4} * s.q_len * dim);
    EXPECT_EQ(changed(clean.k, poisoned.k), int64_t{2} * s.k_len * dim);
    EXPECT_EQ(changed(clean.v, poisoned.v), int64_t{2} * s.k_len * dim);
  }
}

class HangSpec : public testing::Test {
 protected:
  HangSpec() {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    case_.name = "late";
    case_.problem = {{1, 1, 64, {{40, 40}}}, DType::kBF16, {.method = Method::kDense}};
    setenv("PBS_PLANTED_HANG", "block 7 waits for k_full[1]", /*overwrite=*/1);
  }
  ~HangSpec() override { unsetenv("PBS_PLANTED_HANG"); }

  Case case_;
};

TEST_F(HangSpec, AProgramWhoseKernelNeverReturnsEndsAndSaysWhatItWaitsFor) {
  const auto wait_forever = [&] {
    const Device device;
    const auto watchdog = EndIfLate(device, case_, 1);
    std::promise<void>().get_future().wait();
  };
  EXPECT_EXIT(wait_forever(), testing::ExitedWithCode(2),
              "\"case\": \"late\".*\"hang\": \"block 7 waits for k_full\\[1\\]\", "
              "\"hung\": true.*"
              "not over after 1 s");
}

TEST_F(HangSpec, AKernelThatHangsWhereNobodyLooksIsLateAllTheSame) {
  unsetenv("PBS_PLANTED_HANG");
  const auto wait_forever = [&] {
    const Device device;
    const auto watchdog = EndIfLate(device, case_, 1);
    std::promise<void>().get_future().wait();
  };
  EXPECT_EXIT(wait_forever(), testing::ExitedWithCode(2),
              "\"right\": false, \"hung\": true");
}

TEST_F(HangSpec, ACaseInTimeIsNotEnded) {
  const Device device;
  static_cast<void>(EndIfLate(device, case_, 1000));
}

TEST_F(HangSpec, NothingRunsBehindTheFirstRunThatHung) {
  const auto session = Session::Open(cuda::AttentionVariant::kChosen);
  ASSERT_TRUE(session.ok()) << session.status().ToString();
  const auto outputs = RunCase(**session, case_, Inputs(case_));
  EXPECT_THAT(outputs.status().ToString(), HasSubstr("a wait did not end"));
}

TEST(BarrierNamesSpec, ABarrierHasItsNameInTheKernelOfItsVariant) {
  using enum cuda::AttentionVariant;
  const auto check = [&]<int kHeadDim, cuda::AttentionVariant kVariant>() {
    using Shared =
        cuda::Sm90Shared<cuda::Sm90Config<cuda::Bf16Element, kHeadDim,
                                          cuda::Sm90OptionsOf(kHeadDim, kVariant)>>;
    const auto name = [](size_t begin, size_t index) {
      const auto at = static_cast<int32_t>(begin + index * sizeof(cuda::Mbarrier));
      return cuda::NameSm90Barrier</*kAll=*/true>(kHeadDim, kVariant, at);
    };
    const size_t last = sizeof(Shared::v_empty) / sizeof(cuda::Mbarrier) - 1;
    EXPECT_EQ(name(offsetof(Shared, k_full), 1), "k_full[1]");
    EXPECT_EQ(name(offsetof(Shared, v_empty), last),
              "v_empty[" + std::to_string(last) + "]");
    EXPECT_EQ(name(0, 0), "offset 0");
  };
  check.operator()<128, kChosen>();
  check.operator()<128, kMoreStages>();
  check.operator()<128, kDirectOutputs>();
  check.operator()<64, kMoreStages>();
  check.operator()<64, kWideTiles>();
}

TEST(CasesSpec, OneCaseHasMoreTilesThanAGpuHasMultiprocessors) {
  int64_t most = 0;
  for (const Case& c : TableCases(1)) {
    const AttentionGeometry g = MakeGeometry(c.problem);
    most = std::max(most, g.total_query_blocks * g.num_heads);
  }
  EXPECT_GT(most, 144);
}

}  // namespace
}  // namespace pbs::gpu
