// Spec: prompts that share a run (server/engine/prefill_group.h), through the engine,
// on the CPU and on a device with memory of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/engine/prefill_task.h"
#include "tests/support/device_backend.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing::UnorderedElementsAreArray;

constexpr int64_t kDeviceBytesMax = 8 << 20;
constexpr BatchLimits kLimits = {.tokens_max = 200, .prompt_tokens_max = 90};

enum class Where { kCpu, kDevice };

class PrefillBatchSpec : public EngineFixture,
                         public testing::WithParamInterface<Where> {
 protected:
  PrefillBatchSpec() {
    if (GetParam() == Where::kDevice)
      device_ = std::make_unique<testing_support::DeviceBackend>();
    Backend& backend = device_ != nullptr ? *device_ : TestModel::TheBackend();
    model_.name = "tiny";
    model_.replicas.push_back(*Model::Load(folder_.path(), {}, backend));
    model_.tokens_max = model_.model().config().max_tokens;
    batching_ = std::make_unique<DeviceEngine>(
        EngineOptions{.queue_requests_max = 64, .batch = kLimits},
        EngineParts{backend, ledger_, clock_, timers_, metrics_, costs_,
                    device_ != nullptr ? &device_ledger_ : nullptr});
  }
  ~PrefillBatchSpec() override { EXPECT_EQ(device_ledger_.bytes_held(), 0); }

  struct Submitted {
    std::vector<int32_t> tokens;
    std::shared_ptr<HeldKv> kv;
    JobId id = 0;
    PrefillRecorder recorder;
  };
  void Submit(Submitted& prompt, int32_t num_tokens, uint32_t seed,
              AttentionOptions attention = Dense(),
              std::vector<int32_t> logit_positions = {}) {
    PrefillJob job;
    job.model = &model_;
    job.tokens = prompt.tokens = Tokens(num_tokens, seed);
    job.all_logits_last_token = true;
    job.top_logits = 2;
    job.logit_positions = logit_positions;
    auto reserved =
        batching_->ReservePrefill(model_, {num_tokens, attention, logit_positions});
    ASSERT_TRUE(reserved.ok()) << reserved.status();
    job.kv = prompt.kv = std::move(reserved->kv);
    job.reservation = std::move(reserved->workspace);
    const auto admission = batching_->SubmitPrefill(std::move(job), prompt.recorder);
    ASSERT_TRUE(admission.ok()) << admission.status();
    prompt.id = admission->id;
  }
  void RunBatching() {
    while (batching_->executor().RunOneStep()) {
    }
  }
  // As the same prompt alone, on the fixture's engine.
  void ExpectAsAlone(const Submitted& prompt, AttentionOptions attention = Dense(),
                     std::vector<int32_t> logit_positions = {}) {
    PrefillJob job;
    job.model = &TestModel::Get();
    job.tokens = prompt.tokens;
    job.all_logits_last_token = true;
    job.top_logits = 2;
    job.logit_positions = logit_positions;
    const auto num_tokens = static_cast<int32_t>(prompt.tokens.size());
    auto reserved =
        engine_.ReservePrefill(*job.model, {num_tokens, attention, logit_positions});
    job.kv = std::move(reserved->kv);
    job.reservation = std::move(reserved->workspace);
    const std::shared_ptr<HeldKv> kv = job.kv;
    PrefillRecorder alone;
    ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), alone).ok());
    RunAll();
    ASSERT_TRUE(prompt.recorder.result.ok()) << prompt.recorder.result.status();
    const PrefillResult& actual = *prompt.recorder.result;
    const PrefillResult& expected = *alone.result;
    EXPECT_EQ(actual.first_token_id, expected.first_token_id);
    for (size_t i = 0; i < expected.last_token_logits.size(); ++i) {
      ASSERT_NEAR(actual.last_token_logits[i], expected.last_token_logits[i], 1e-4);
    }
    ASSERT_EQ(actual.positions.size(), expected.positions.size());
    for (size_t i = 0; i < expected.positions.size(); ++i) {
      EXPECT_EQ(actual.positions[i][0].token_id, expected.positions[i][0].token_id);
    }
    EXPECT_EQ(prompt.kv->cache().num_tokens(), num_tokens);
    EXPECT_THAT(prompt.recorder.events, UnorderedElementsAreArray(alone.events));
    EXPECT_EQ(prompt.recorder.events.back(), "done OK");
    for (int32_t layer = 0; layer < 3; ++layer) {
      ExpectNear(prompt.kv->cache().k(layer), kv->cache().k(layer),
                 kv->cache().shape());
      ExpectNear(prompt.kv->cache().v(layer), kv->cache().v(layer),
                 kv->cache().shape());
    }
  }
  static void ExpectNear(const void* actual, const void* expected,
                         const KvShape& shape) {
    const auto* a = static_cast<const float*>(actual);
    const auto* b = static_cast<const float*>(expected);
    for (int64_t i = 0; i < shape.plane_bytes() / 4; ++i) ASSERT_NEAR(a[i], b[i], 1e-4);
  }
  // How many runs there were of so many prompts.
  double Runs(size_t prompts) const {
    const auto family = metrics_.engine.batch_requests.Collect().histogram;
    const size_t bucket = prompts == 1 ? 0 : prompts == 2 ? 1 : 2;  // 1, 2, 3 .. 4
    const auto below = bucket == 0 ? 0 : family.bucket[bucket - 1].cumulative_count;
    return static_cast<double>(family.bucket[bucket].cumulative_count - below);
  }

  testing_support::TinyModelFolder folder_;
  ByteLedger device_ledger_{kDeviceBytesMax};
  std::unique_ptr<testing_support::DeviceBackend> device_;
  ServedModel model_;
  std::unique_ptr<DeviceEngine> batching_;
  Submitted a_, b_, c_, d_;
};

TEST_P(PrefillBatchSpec, EveryPromptGetsWhatItGetsAlone) {
  Submit(a_, 37, 1);
  Submit(b_, 1, 2);
  Submit(c_, 90, 3, Dense(), {5, 40});
  RunBatching();
  EXPECT_EQ(Runs(3), 1);
  ExpectAsAlone(a_);
  ExpectAsAlone(b_);
  ExpectAsAlone(c_, Dense(), {5, 40});
}

TEST_P(PrefillBatchSpec, SparsePromptsToo) {
  AttentionOptions sparse = SmallPbs();
  sparse.threshold = 0.9f;
  Submit(a_, 80, 1, sparse);
  Submit(b_, 70, 2, sparse);
  RunBatching();
  EXPECT_EQ(Runs(2), 1);
  ExpectAsAlone(a_, sparse);
  ExpectAsAlone(b_, sparse);
}

TEST_P(PrefillBatchSpec, OnlyShortOnesOfOneKindShareARun) {
  AttentionOptions measured = Dense();
  measured.coverage_rows = 4;
  Submit(a_, 91, 1);  // too long
  Submit(b_, 20, 2, SmallPbs());
  Submit(c_, 20, 3);
  Submit(d_, 20, 4, measured);  // of itself alone
  RunBatching();
  EXPECT_EQ(Runs(1), 4);
  for (const Submitted* prompt : {&a_, &b_, &c_, &d_}) {
    EXPECT_TRUE(prompt->recorder.result.ok());
  }
}

TEST_P(PrefillBatchSpec, TheTokensOfARunAreBounded) {
  Submit(a_, 90, 1);
  Submit(b_, 90, 2);
  Submit(c_, 90, 3);
  RunBatching();
  EXPECT_EQ(Runs(2), 1);
  EXPECT_EQ(Runs(1), 1);
  ExpectAsAlone(c_);
}

TEST_P(PrefillBatchSpec, OneThatIsCancelledLeavesAndNothingOfItIsKept) {
  Submit(a_, 30, 1);
  Submit(b_, 40, 2);
  Submit(c_, 50, 3);
  ASSERT_TRUE(batching_->executor().RunOneStep());
  batching_->Cancel(b_.id, CancelReason::kCaller);
  RunBatching();
  EXPECT_EQ(b_.recorder.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(b_.kv->finished());
  EXPECT_LE(b_.kv->layers_ready(), 1);
  EXPECT_EQ(b_.recorder.num_done, 1);
  ExpectAsAlone(a_);
  ExpectAsAlone(c_);
}

TEST_P(PrefillBatchSpec, TheFirstOneMayLeaveToo) {
  Submit(a_, 30, 1);
  Submit(b_, 40, 2);
  ASSERT_TRUE(batching_->executor().RunOneStep());
  batching_->Cancel(a_.id, CancelReason::kCaller);
  a_.kv.reset();  // its memory is gone when the run writes on
  RunBatching();
  ExpectAsAlone(b_);
}

TEST_P(PrefillBatchSpec, BytesGoBackWhenTheLastOneIsDone) {
  Submit(a_, 30, 1);
  Submit(b_, 40, 2);
  RunBatching();
  const int64_t caches =
      a_.kv->cache().shape().bytes() + b_.kv->cache().shape().bytes();
  EXPECT_EQ(ledger_.bytes_held(), caches);
  EXPECT_EQ(device_ledger_.bytes_held(), 0);
}

TEST_P(PrefillBatchSpec, StageTimesAreThoseOfTheRunAndCountedOnce) {
  Submit(a_, 30, 1);
  Submit(b_, 40, 2);
  RunBatching();
  EXPECT_EQ(a_.recorder.result->stages.mlp > 0, true);
  EXPECT_EQ(a_.recorder.result->stages.attend, b_.recorder.result->stages.attend);
  const auto& attend = metrics_.engine.StageTime(Stage::kAttend);
  EXPECT_EQ(attend.Collect().histogram.sample_count, 1u);
  EXPECT_EQ(metrics_.engine.time_to_kv_ready.Collect().histogram.sample_count, 2u);
  EXPECT_EQ(metrics_.engine.prompt_tokens.Value(), 70);
  const auto predicted =
      costs_.Predict(PrefillCostKey(model_, Dense()), PrefillWork(70), clock_.Now());
  EXPECT_TRUE(predicted.has_value());
}

INSTANTIATE_TEST_SUITE_P(On, PrefillBatchSpec,
                         testing::Values(Where::kCpu, Where::kDevice),
                         [](const auto& each) {
                           return each.param == Where::kCpu ? "cpu" : "device";
                         });

}  // namespace
}  // namespace pbs::server
