// Spec: captured queries through server/engine/engine.h, on the CPU and on a device
// with memory of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "tests/support/device_backend.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;

class QueryCaptureSpec : public EngineFixture {
 protected:
  static PrefillJob MakeJob(DeviceEngine& engine, const ServedModel& model,
                            int32_t num_tokens, std::vector<int32_t> layers) {
    PrefillJob job;
    job.model = &model;
    job.tokens = Tokens(num_tokens);
    auto reserved = engine.ReservePrefill(model, {.num_tokens = num_tokens,
                                                  .attention = Dense(),
                                                  .query_layers = std::move(layers)});
    EXPECT_TRUE(reserved.ok()) << reserved.status();
    job.kv = std::move(reserved->kv);
    job.reservation = std::move(reserved->workspace);
    return job;
  }

  PrefillRecorder listener_;
};

TEST_F(QueryCaptureSpec, QueriesAreChargedWithTheCacheAndFreedWithIt) {
  const Model& model = TestModel::Get().model();
  const int64_t plain = engine_.ReservePrefill(TestModel::Get(), {20, Dense()}).ok()
                            ? MakePrefill(20).reservation.host.bytes()
                            : 0;
  PrefillJob job = MakeJob(engine_, TestModel::Get(), 20, {0, 2});
  const int64_t held =
      model.kv_shape(20).bytes() + 2 * model.query_shape(20).layer_bytes();
  EXPECT_EQ(job.reservation.host.bytes(), plain);
  EXPECT_EQ(ledger_.bytes_held(), plain + held);
  EXPECT_EQ(metrics_.kv.Held(Tier::kHost).Value(), static_cast<double>(held));
  std::shared_ptr<HeldKv> kv = job.kv;
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), listener_).ok());
  RunAll();
  EXPECT_EQ(ledger_.bytes_held(), held);
  kv.reset();
  EXPECT_EQ(ledger_.bytes_held(), 0);
  EXPECT_EQ(metrics_.kv.Held(Tier::kHost).Value(), 0);
}

TEST_F(QueryCaptureSpec, QueriesThatCouldNeverFitAreOutOfRangeAndHoldNothing) {
  const Model& model = TestModel::Get().model();
  ByteLedger exact(MakePrefill(100).reservation.host.bytes() +
                   model.kv_shape(100).bytes());
  DeviceEngine engine(
      {}, {TestModel::TheBackend(), exact, clock_, timers_, metrics_, costs_});
  EXPECT_TRUE(engine.ReservePrefill(TestModel::Get(), {100, Dense()}).ok());
  const auto refused = engine.ReservePrefill(
      TestModel::Get(), {.num_tokens = 100, .attention = Dense(), .query_layers = {1}});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("more than memory_bytes_max"));
  EXPECT_EQ(exact.bytes_held(), 0);
}

TEST_F(QueryCaptureSpec, ACancelledCaptureHoldsNothing) {
  const auto admission =
      engine_.SubmitPrefill(MakeJob(engine_, TestModel::Get(), 20, {0}), listener_);
  RunSteps(1);
  engine_.Cancel(admission->id, CancelReason::kCaller);
  RunAll();
  EXPECT_EQ(listener_.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(QueryCaptureSpec, ADeviceCapturesWhatTheCpuCaptures) {
  const testing_support::TinyModelFolder folder;
  testing_support::DeviceBackend device;
  ByteLedger device_ledger(8 << 20);
  ServedModel model;
  model.name = "tiny";
  model.replicas.push_back(*Model::Load(folder.path(), {}, device));
  model.tokens_max = model.model().config().max_tokens;
  DeviceEngine on_device({.queue_requests_max = 1}, {device, ledger_, clock_, timers_,
                                                     metrics_, costs_, &device_ledger});
  PrefillJob job = MakeJob(on_device, model, 40, {0, 1, 2});
  PrefillJob same = MakeJob(engine_, TestModel::Get(), 40, {0, 1, 2});
  const std::shared_ptr<HeldKv> actual = job.kv;
  const std::shared_ptr<HeldKv> expected = same.kv;
  PrefillRecorder cpu;
  ASSERT_TRUE(on_device.SubmitPrefill(std::move(job), listener_).ok());
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(same), cpu).ok());
  while (on_device.executor().RunOneStep()) {
  }
  RunAll();
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  for (int32_t layer = 0; layer < 3; ++layer) {
    const auto bytes = static_cast<size_t>(actual->queries().shape().layer_bytes());
    EXPECT_EQ(std::memcmp(actual->queries().data(layer),
                          expected->queries().data(layer), bytes),
              0)
        << layer;
  }
}

TEST_F(QueryCaptureSpec, APromptThatCapturesSharesNoRun) {
  DeviceEngine batching(
      {.queue_requests_max = 4, .batch = {.tokens_max = 200, .prompt_tokens_max = 90}},
      {TestModel::TheBackend(), ledger_, clock_, timers_, metrics_, costs_});
  PrefillRecorder other;
  ASSERT_TRUE(
      batching.SubmitPrefill(MakeJob(batching, TestModel::Get(), 20, {1}), listener_)
          .ok());
  ASSERT_TRUE(
      batching.SubmitPrefill(MakeJob(batching, TestModel::Get(), 20, {}), other).ok());
  while (batching.executor().RunOneStep()) {
  }
  EXPECT_TRUE(listener_.result.ok()) << listener_.result.status();
  EXPECT_TRUE(other.result.ok()) << other.result.status();
  const auto runs = metrics_.engine.batch_requests.Collect().histogram;
  EXPECT_EQ(runs.bucket[0].cumulative_count, 2u);  // of one prompt each
}

}  // namespace
}  // namespace pbs::server
