// Spec: reports of pbs/attention.h and cuda/backend/report_slots.h, over an emulated
// device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <random>
#include <vector>

#include "cuda/backend/cuda_backend.h"
#include "cuda/backend/report_slots.h"
#include "emulator/emulated_driver.h"

namespace pbs::emulator {
namespace {

using testing::HasSubstr;

// Small enough for the emulator: a few queries behind segments of one block.
AttentionProblem Pbs(std::vector<SequenceShape> sequences) {
  return {{1, 1, 64, std::move(sequences)},
          DType::kBF16,
          {.segment_size = 128, .threshold = 0.5f, .coverage_rows = 3}};
}

// Attention on a device of its own.
class ReportSpec : public testing::Test {
 protected:
  void Open(const EmulatedOptions& options = {}) {
    backend_.reset();
    auto made = std::make_unique<EmulatedDriver>(options);
    driver_ = made.get();
    backend_ = *cuda::CudaBackend::Create(std::move(made));
  }

  // A problem with its tensors on the device.
  struct Case {
    std::unique_ptr<AttentionPlan> plan;
    Buffer q, k, v, o, workspace;

    AttentionTensors Tensors() const {
      const AttentionGeometry& g = plan->geometry;
      AttentionTensors tensors;
      tensors.q = {q.data(), PackedLayout(g.total_q, g.head_dim)};
      tensors.k = {k.data(), PackedLayout(g.total_k, g.head_dim)};
      tensors.v = {v.data(), PackedLayout(g.total_k, g.head_dim)};
      tensors.o = {o.data(), PackedLayout(g.total_q, g.head_dim)};
      return tensors;
    }
  };
  Case Make(const AttentionProblem& problem, float size = 1.5f) {
    Case made;
    made.plan = *backend_->Plan(problem);
    const AttentionGeometry& g = made.plan->geometry;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    const auto upload = [&](int64_t rows) {
      std::vector<uint16_t> values(static_cast<size_t>(rows * g.head_dim));
      for (uint16_t& x : values) x = ToBf16(size * normal(random)).bits;
      const auto bytes = static_cast<int64_t>(2 * values.size());
      Buffer buffer = *backend_->Allocate(bytes);
      EXPECT_TRUE(backend_->Upload(values.data(), buffer.data(), bytes).ok());
      return buffer;
    };
    made.q = upload(g.num_heads * g.total_q);
    made.k = upload(g.num_kv_heads * g.total_k);
    made.v = upload(g.num_kv_heads * g.total_k);
    made.o = *backend_->Allocate(made.q.bytes());
    made.workspace = *backend_->Allocate(made.plan->workspace_bytes);
    return made;
  }
  Status Run(const Case& c) {
    return backend_->Run(*c.plan, c.Tensors(), c.workspace.workspace(), {});
  }
  Status Start(const Case& c) {
    return backend_->StartReport(*c.plan, c.workspace.workspace());
  }
  // What nobody but the report may still be interested in.
  void Overwrite(const Case& c) {
    const std::vector<char> noise(static_cast<size_t>(c.workspace.bytes()), 0x5A);
    EXPECT_TRUE(
        backend_->Upload(noise.data(), c.workspace.data(), c.workspace.bytes()).ok());
  }
  AttentionReport Read(const Case& c) {
    AttentionReport report;
    EXPECT_TRUE(Run(c).ok());
    EXPECT_TRUE(
        backend_->ReadReport(*c.plan, c.workspace.workspace(), {}, &report).ok());
    return report;
  }

  EmulatedDriver* driver_ = nullptr;  // the backend's
  std::unique_ptr<cuda::CudaBackend> backend_;
};

void ExpectEqual(const AttentionReport& actual, const AttentionReport& expected) {
  EXPECT_EQ(actual.stats.executed_blocks, expected.stats.executed_blocks);
  EXPECT_EQ(actual.stats.lower_blocks, expected.stats.lower_blocks);
  EXPECT_EQ(actual.stats.causal_blocks, expected.stats.causal_blocks);
  EXPECT_EQ(actual.stats.dense_blocks, expected.stats.dense_blocks);
  EXPECT_EQ(actual.stats.executed_flops, expected.stats.executed_flops);
  EXPECT_EQ(actual.stats.dense_flops, expected.stats.dense_flops);
  EXPECT_EQ(actual.stats.method_run, expected.stats.method_run);
  EXPECT_EQ(actual.heads.density, expected.heads.density);
  EXPECT_EQ(actual.heads.coverage.size(), expected.heads.coverage.size());
  EXPECT_EQ(actual.stats.coverage, expected.stats.coverage);
  EXPECT_EQ(actual.stats.coverage_rows, expected.stats.coverage_rows);
  EXPECT_GT(actual.stats.permute_seconds, 0);
  EXPECT_GT(actual.stats.select_seconds, 0);
  EXPECT_GT(actual.stats.attend_seconds, 0);
  EXPECT_TRUE(actual.order.empty() && actual.lists.count.empty());
}

TEST_F(ReportSpec, TwoUnderWayFinishInTheirOrderWhateverBecomesOfTheWorkspace) {
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Open({.seed = seed});
    const Case a = Make(Pbs({{20, 400}}));
    const Case b = Make(Pbs({{10, 500}, {1, 140}}));
    const AttentionReport expected_a = Read(a);
    const AttentionReport expected_b = Read(b);
    ASSERT_NE(expected_a.stats.executed_blocks, expected_b.stats.executed_blocks);
    ASSERT_TRUE(Run(a).ok() && Start(a).ok());
    for (int i = 0; i < 2; ++i) {
      Overwrite(a);
      ASSERT_TRUE(Run(b).ok() && Start(b).ok());
      Overwrite(b);
      AttentionReport report;
      ASSERT_TRUE(backend_->FinishReport(*a.plan, &report).ok());
      ExpectEqual(report, expected_a);
      ASSERT_TRUE(Run(a).ok() && Start(a).ok());
      ASSERT_TRUE(backend_->FinishReport(*b.plan, &report).ok());
      ExpectEqual(report, expected_b);
    }
    AttentionReport report;
    ASSERT_TRUE(backend_->FinishReport(*a.plan, &report).ok());
    ExpectEqual(report, expected_a);
  }
}

TEST_F(ReportSpec, ARunMayBeRepeatedWithoutAReport) {
  Open();
  const Case c = Make(Pbs({{20, 400}}));
  const AttentionReport expected = Read(c);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Run(c).ok());
  ExpectEqual(Read(c), expected);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Run(c).ok());
  ASSERT_TRUE(Start(c).ok());
  AttentionReport report;
  ASSERT_TRUE(backend_->FinishReport(*c.plan, &report).ok());
  ExpectEqual(report, expected);
}

// The emulated device counts operations for time.
TEST_F(ReportSpec, CoverageTakesNothingOfTheStages) {
  Open();
  AttentionProblem problem = Pbs({{20, 400}});
  const AttentionStats measured = Read(Make(problem)).stats;
  problem.options.coverage_rows = 0;
  const AttentionStats plain = Read(Make(problem)).stats;
  EXPECT_EQ(measured.coverage_rows, 3);
  EXPECT_GT(measured.coverage, 0.1);
  EXPECT_LT(measured.coverage, 1);
  EXPECT_EQ(plain.coverage_rows, 0);
  EXPECT_EQ(plain.coverage, 0);
  const auto total = [](const AttentionStats& stats) {
    return stats.permute_seconds + stats.select_seconds + stats.attend_seconds;
  };
  EXPECT_DOUBLE_EQ(total(measured), total(plain));
}

TEST_F(ReportSpec, OverflowIsToldByTheReportAndTheNextOneIsNotHarmed) {
  Open();
  const Case good = Make(Pbs({{20, 400}}));
  const Case bad = Make(Pbs({{20, 400}}), 3e19f);
  const AttentionReport expected = Read(good);
  ASSERT_TRUE(Run(bad).ok() && Start(bad).ok());
  ASSERT_TRUE(Run(good).ok() && Start(good).ok());
  AttentionReport report;
  const Status overflow = backend_->FinishReport(*bad.plan, &report);
  EXPECT_EQ(overflow.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(overflow.message(), HasSubstr("attention scores pass the largest f32"));
  ASSERT_TRUE(backend_->FinishReport(*good.plan, &report).ok());
  ExpectEqual(report, expected);
  ExpectEqual(Read(good), expected);
}

TEST_F(ReportSpec, ADeviceThatBreaksEndsEveryReport) {
  int64_t broken = 0;
  // Behind what Make() asks for.
  for (int64_t breaks_at = 20;; ++breaks_at) {
    SCOPED_TRACE(breaks_at);
    Open({.breaks_at = breaks_at});
    const Case c = Make(Pbs({{20, 400}}));
    Status status = Run(c);
    int under_way = 0;
    for (int i = 0; i < 2 && status.ok(); ++i) {
      if (i > 0) status = Run(c);
      if (status.ok()) status = Start(c);
      under_way += status.ok() ? 1 : 0;
    }
    AttentionReport report;
    for (; under_way > 1; --under_way)
      status = backend_->FinishReport(*c.plan, &report);
    // One may be left when the backend goes.
    if (status.ok() && backend_->Health().ok()) break;
    ++broken;
    EXPECT_THAT(backend_->Health().message(), HasSubstr("the device broke"));
    EXPECT_FALSE(status.ok());
  }
  EXPECT_GT(broken, 5);
}

TEST(ReportSlotsSpec, GrowOnceWithWhatIsAskedOfThemAndKeepIt) {
  EmulatedDriver driver({});
  const auto slots = *cuda::ReportSlots::Create(driver);
  constexpr int64_t kBytes = 5000;
  void* summary = *driver.Allocate(cuda::StreamId::kCompute, kBytes);
  ASSERT_TRUE(driver.Clear(cuda::StreamId::kCompute, summary, kBytes).ok());
  const int64_t before = driver.bytes_held();
  for (int i = 0; i < 3; ++i) {
    for (int under_way = 1; under_way <= kReportsUnderWayMax; ++under_way) {
      ASSERT_TRUE(slots->MarkBegin().ok() && slots->MarkEnd().ok());
      ASSERT_TRUE(slots->Start(summary, kBytes).ok());
      EXPECT_EQ(slots->under_way(), under_way);
    }
    for (int left = kReportsUnderWayMax - 1; left >= 0; --left) {
      const auto arrived = slots->Finish();
      ASSERT_TRUE(arrived.ok()) << arrived.status().ToString();
      EXPECT_EQ(std::count(arrived->summary, arrived->summary + kBytes, std::byte{0}),
                kBytes);
      EXPECT_GT(arrived->seconds, 0);
      EXPECT_EQ(slots->under_way(), left);
    }
    EXPECT_EQ(driver.bytes_held(), before + kReportsUnderWayMax * (8192 - 4096));
  }
  driver.Free(summary);
}

}  // namespace
}  // namespace pbs::emulator
