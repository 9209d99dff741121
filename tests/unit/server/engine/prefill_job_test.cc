// Spec: prefills through server/engine/engine.h, on the real CPU backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "server/model/prefill.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class PrefillJobSpec : public EngineFixture {
 protected:
  // The same prefill without an engine.
  static std::vector<float> LogitsOf(const std::vector<int32_t>& tokens,
                                     const AttentionOptions& attention) {
    const Model& model = TestModel::Get().model();
    const auto num_tokens = static_cast<int32_t>(tokens.size());
    const PrefillPlan plan =
        *PlanPrefill(model, {.num_tokens = num_tokens, .attention = attention});
    KvCache cache = *KvCache::Create(model.kv_shape(num_tokens), model.backend());
    const Buffer workspace = *model.backend().Allocate(plan.workspace_bytes);
    auto run = *PrefillRun::Start(model, plan, {.tokens = tokens}, cache,
                                  workspace.workspace());
    while (!run->layers_done()) EXPECT_TRUE(run->RunLayer(nullptr, {}).ok());
    EXPECT_TRUE(run->ComputeLogits().ok());
    std::vector<float> logits(static_cast<size_t>(model.config().vocab_size));
    EXPECT_TRUE(run->ReadLogits(0, logits).ok());
    return logits;
  }

  PrefillRecorder listener_;
};

TEST_F(PrefillJobSpec, PublishesLayerByLayerAndCompletesOnce) {
  PrefillJob job = MakePrefill(20);
  KvFollower follower([&](int32_t layer) {
    listener_.events.push_back("kv " + std::to_string(layer));
  });
  follower.Follow(*job.kv);
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), listener_).ok());
  RunAll();
  EXPECT_THAT(listener_.events, ElementsAre("kv 0", "layer 0", "kv 1", "layer 1",
                                            "kv 2", "layer 2", "done OK"));
  EXPECT_EQ(listener_.num_done, 1);
}

TEST_F(PrefillJobSpec, GivesTheModelsOwnLogits) {
  PrefillJob job = MakePrefill(50);
  job.all_logits_last_token = true;
  const std::vector<float> expected = LogitsOf(job.tokens, Dense());
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), listener_).ok());
  RunAll();
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  EXPECT_EQ(listener_.result->last_token_logits, expected);
  EXPECT_EQ(listener_.result->first_token_id, Argmax(expected));
}

TEST_F(PrefillJobSpec, GivesTheBestTokensOfTheLastAndOfAskedPositions) {
  const std::vector<int32_t> tokens = Tokens(40);
  PrefillJob job = MakePrefill(40);
  job.reservation.Reset();
  job.kv.reset();
  auto reserved = engine_.ReservePrefill(*job.model, {40, Dense(), {9}});
  ASSERT_TRUE(reserved.ok());
  job.kv = std::move(reserved->kv);
  job.reservation = std::move(reserved->workspace);
  job.top_logits = 3;
  job.logit_positions = {9};
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), listener_).ok());
  RunAll();
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  const PrefillResult& result = *listener_.result;
  ASSERT_EQ(result.top_logits.size(), 3u);
  EXPECT_EQ(result.top_logits[0].token_id, result.first_token_id);
  EXPECT_GE(result.top_logits[0].log_probability, result.top_logits[1].log_probability);
  ASSERT_EQ(result.positions.size(), 1u);
  ASSERT_EQ(result.positions[0].size(), 3u);
  // Position 9 sees ten tokens: its logits are those of the prompt that ends there.
  const std::vector<int32_t> prefix(tokens.begin(), tokens.begin() + 10);
  EXPECT_EQ(result.positions[0][0].token_id, Argmax(LogitsOf(prefix, Dense())));
  EXPECT_TRUE(result.last_token_logits.empty());
}

TEST_F(PrefillJobSpec, TheCacheIsCompleteForItsReaders) {
  PrefillJob job = MakePrefill(20);
  const std::shared_ptr<HeldKv> kv = job.kv;
  int ready = 0;
  kv->WhenReady(2, [&] { ++ready; });
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), listener_).ok());
  RunSteps(2);
  EXPECT_EQ(kv->layers_ready(), 2);
  EXPECT_EQ(ready, 0);
  RunAll();
  EXPECT_EQ(ready, 1);
  EXPECT_TRUE(kv->finished());
  EXPECT_TRUE(kv->status().ok());
  EXPECT_EQ(kv->cache().num_tokens(), 20);
}

TEST_F(PrefillJobSpec, ReportsWhatEveryLayerDid) {
  ASSERT_TRUE(engine_.SubmitPrefill(MakePrefill(200, SmallPbs()), listener_).ok());
  RunAll();
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  const PrefillResult& result = *listener_.result;
  ASSERT_EQ(result.layers.size(), 3u);
  for (const AttentionStats& layer : result.layers) {
    EXPECT_EQ(layer.method_run, Method::kPbs);
    EXPECT_GT(layer.Density(), 0);
    EXPECT_GT(layer.dense_flops, 0);
  }
  EXPECT_GT(result.stages.qkv, 0);
  EXPECT_GT(result.stages.permute, 0);
  EXPECT_GT(result.stages.attend, 0);
  EXPECT_GT(result.stages.mlp, 0);
}

TEST_F(PrefillJobSpec, CountsTheWaitFromAdmission) {
  ASSERT_TRUE(engine_.SubmitPrefill(MakePrefill(20), listener_).ok());
  clock_.Advance(absl::Seconds(2));
  listener_.on_layer_done = [this](int32_t) { clock_.Advance(absl::Seconds(1)); };
  RunAll();
  ASSERT_TRUE(listener_.result.ok());
  EXPECT_EQ(listener_.result->stages.queue, 2);
  EXPECT_EQ(listener_.result->time_to_first_layer_seconds, 2);
  EXPECT_EQ(listener_.result->total_seconds, 5);
}

TEST_F(PrefillJobSpec, AnOvertakenPrefillGivesTheSameBits) {
  PrefillJob slow = MakePrefill(150, SmallPbs());
  slow.all_logits_last_token = true;
  const std::vector<float> expected = LogitsOf(slow.tokens, SmallPbs());
  PrefillRecorder urgent_listener;
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(slow), listener_).ok());
  RunSteps(1);
  PrefillJob urgent = MakePrefill(80, SmallPbs());
  urgent.terms.priority = 1;
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(urgent), urgent_listener).ok());
  RunSteps(3);
  EXPECT_EQ(urgent_listener.num_done, 1);
  EXPECT_EQ(listener_.num_done, 0);
  RunAll();
  ASSERT_TRUE(listener_.result.ok());
  EXPECT_EQ(listener_.result->last_token_logits, expected);
}

// ---- memory

TEST_F(PrefillJobSpec, ChargesCacheAndWorkspaceAndKeepsOnlyTheCache) {
  const Model& model = TestModel::Get().model();
  const int64_t cache = model.kv_shape(20).bytes();
  PrefillJob job = MakePrefill(20);
  const std::shared_ptr<HeldKv> kv = job.kv;
  const int64_t charged = ledger_.bytes_held();
  EXPECT_GT(charged, cache);
  EXPECT_EQ(metrics_.kv.Held(Tier::kHost).Value(), static_cast<double>(cache));
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(job), listener_).ok());
  RunSteps(1);
  EXPECT_EQ(ledger_.bytes_held(), charged);
  RunAll();
  EXPECT_EQ(ledger_.bytes_held(), cache);
}

TEST_F(PrefillJobSpec, TheLastOwnerOfACacheFreesIt) {
  ASSERT_TRUE(engine_.SubmitPrefill(MakePrefill(20), listener_).ok());
  RunAll();
  EXPECT_EQ(ledger_.bytes_held(), 0);
  EXPECT_EQ(metrics_.kv.Held(Tier::kHost).Value(), 0);
}

TEST_F(PrefillJobSpec, WhatCouldNeverFitIsOutOfRangeAndAllocatesNothing) {
  ByteLedger tiny(1000);
  DeviceEngine engine(
      {}, {TestModel::TheBackend(), tiny, clock_, timers_, metrics_, costs_});
  const auto refused = engine.ReservePrefill(TestModel::Get(), {100, Dense()});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("more than memory_bytes_max 1000"));
}

TEST_F(PrefillJobSpec, WhatDoesNotFitNowSaysTryAgain) {
  const ByteReservation others = *ledger_.Reserve(kBytesMax - 1000);
  const auto refused = engine_.ReservePrefill(TestModel::Get(), {100, Dense()});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(PrefillJobSpec, AReservationForAnotherShapeIsOurFault) {
  PrefillJob job = MakePrefill(20);
  job.tokens = Tokens(2000);
  EXPECT_EQ(engine_.SubmitPrefill(std::move(job), listener_).status(),
            absl::InternalError("the prefill was reserved with another shape"));
}

TEST_F(PrefillJobSpec, ARefusedPrefillFreesEverythingAndTellsWhoFollowsItsCache) {
  engine_.Drain([] {});
  PrefillJob job = MakePrefill(20);
  std::shared_ptr<HeldKv> kv = job.kv;
  EXPECT_EQ(engine_.SubmitPrefill(std::move(job), listener_).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(listener_.num_done, 0);
  EXPECT_EQ(kv->status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ledger_.bytes_held(), kv->cache().shape().bytes());
}

// ---- ends before the end

struct StopCase {
  const char* name;
  int steps;      // taken before the stop
  int32_t in_kv;  // or when this layer's keys and values are published
  const char* last_event_before;
};

class StoppedPrefillSpec : public PrefillJobSpec,
                           public testing::WithParamInterface<StopCase> {
 protected:
  // Runs a prefill that `stop(id)` ends where the case says.
  void RunStopped(absl::Time deadline, const std::function<void(JobId)>& stop) {
    PrefillJob job = MakePrefill(200, SmallPbs());
    job.terms.deadline = deadline;
    kv_ = job.kv;
    JobId id = 0;
    KvFollower follower([&](int32_t layer) {
      listener_.events.push_back("kv " + std::to_string(layer));
      if (layer == GetParam().in_kv) stop(id);
    });
    follower.Follow(*kv_);
    id = engine_.SubmitPrefill(std::move(job), listener_)->id;
    RunSteps(GetParam().steps);
    if (GetParam().in_kv < 0) stop(id);
    RunAll();
  }

  void ExpectEndedWith(absl::StatusCode code) {
    EXPECT_EQ(listener_.num_done, 1);
    EXPECT_EQ(listener_.result.status().code(), code);
    if (GetParam().last_event_before[0] != '\0') {
      EXPECT_EQ(*(listener_.events.end() - 2), GetParam().last_event_before);
    }
    EXPECT_EQ(kv_->status().code(), code);
    EXPECT_EQ(ledger_.bytes_held(), kv_->cache().shape().bytes());
    kv_.reset();
    EXPECT_EQ(ledger_.bytes_held(), 0);
    EXPECT_EQ(metrics_.engine.running.Value() + metrics_.engine.waiting.Value(), 0);
  }

  std::shared_ptr<HeldKv> kv_;
};

TEST_P(StoppedPrefillSpec, CancelFreesEverythingAndCompletesOnce) {
  RunStopped(absl::InfiniteFuture(),
             [this](JobId id) { engine_.Cancel(id, CancelReason::kCaller); });
  ExpectEndedWith(absl::StatusCode::kCancelled);
}

TEST_P(StoppedPrefillSpec, ADeadlineFreesEverythingAndCompletesOnce) {
  RunStopped(clock_.Now() + absl::Seconds(5), [this](JobId) {
    clock_.Advance(absl::Seconds(5));
    timers_.RunDue();
  });
  ExpectEndedWith(absl::StatusCode::kDeadlineExceeded);
}

INSTANTIATE_TEST_SUITE_P(
    Moments, StoppedPrefillSpec,
    testing::Values(StopCase{"waiting", 0, -1, ""},
                    StopCase{"after_the_first_layer", 1, -1, "layer 0"},
                    StopCase{"before_the_last_layer", 2, -1, "layer 1"},
                    StopCase{"inside_the_first_attention", 0, 0, "kv 0"},
                    StopCase{"inside_the_last_attention", 0, 2, "kv 2"}),
    [](const auto& param) { return std::string(param.param.name); });

// ---- prediction and metrics

TEST_F(PrefillJobSpec, PredictsOnceSomethingWasMeasured) {
  EXPECT_EQ(engine_.SubmitPrefill(MakePrefill(100), listener_)->predicted_seconds, 0);
  RunAll();
  PrefillRecorder second;
  EXPECT_GT(engine_.SubmitPrefill(MakePrefill(100), second)->predicted_seconds, 0);
  RunAll();
}

TEST_F(PrefillJobSpec, FillsItsMetrics) {
  AttentionOptions options = SmallPbs();
  options.coverage_rows = 4;
  ASSERT_TRUE(engine_.SubmitPrefill(MakePrefill(200, options), listener_).ok());
  RunAll();
  const auto count = [](const prometheus::Histogram& histogram) {
    return histogram.Collect().histogram.sample_count;
  };
  const EngineMetrics& engine = metrics_.engine;
  EXPECT_EQ(engine.prompt_tokens.Value(), 200);
  EXPECT_EQ(count(engine.queue_time), 1u);
  EXPECT_EQ(count(engine.prefill_time), 1u);
  EXPECT_EQ(count(engine.time_to_first_layer), 1u);
  EXPECT_EQ(count(engine.time_to_kv_ready), 1u);
  EXPECT_EQ(count(engine.coverage), 1u);
  EXPECT_EQ(count(engine.Density(Method::kPbs)), 3u);
  EXPECT_EQ(count(engine.StageTime(Stage::kAttend)), 1u);
  EXPECT_EQ(count(engine.StageTime(Stage::kSend)), 0u);
  EXPECT_GT(engine.flops_computed.Value(), 0);
  EXPECT_GT(engine.flops_dense.Value(), 0);
  EXPECT_EQ(engine.memory_budget.Value(), static_cast<double>(kBytesMax));
}

}  // namespace
}  // namespace pbs::server
