// Spec: server/model/prefill.h on a device with memory of its own, where the host is
// one layer ahead.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "tests/support/device_backend.h"
#include "tests/unit/model/tiny_prefill.h"

namespace pbs {
namespace {

using namespace tiny_prefill;  // NOLINT
using testing::ElementsAre;
using testing_support::DeviceBackend;

constexpr int32_t kTokens = 20;

class PrefillAheadSpec : public testing::Test {
 protected:
  void Open(const testing_support::DevicePlan& plan = {}) {
    model_.reset();
    device_ = std::make_unique<DeviceBackend>(plan);
    model_ = LoadTiny(tiny_, *device_);
  }

  // A run with all that it needs, under way.
  struct Run {
    PrefillPlan plan;
    std::vector<int32_t> tokens;
    KvCache cache;
    Buffer workspace;
    EventLog log;
    std::unique_ptr<PrefillRun> run;
  };
  std::unique_ptr<Run> Start(uint32_t seed = 1) {
    auto plan =
        PlanPrefill(*model_, {.num_tokens = kTokens, .attention = kDenseOptions});
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    auto workspace = device_->Allocate(plan->workspace_bytes);
    auto made = std::make_unique<Run>(Run{*std::move(plan),
                                          RandomTokens(kTokens, seed),
                                          MakeCache(*model_, kTokens),
                                          *std::move(workspace),
                                          {},
                                          nullptr});
    auto run = PrefillRun::Start(*model_, made->plan, {.tokens = made->tokens},
                                 made->cache, made->workspace.workspace());
    EXPECT_TRUE(run.ok()) << run.status().ToString();
    made->run = *std::move(run);
    return made;
  }
  static Status Layer(Run& run, const RunControl& control = {}) {
    return run.run->RunLayer(&run.log, control);
  }
  std::vector<float> Logits(Run& run) {
    EXPECT_TRUE(run.run->ComputeLogits().ok());
    std::vector<float> logits(static_cast<size_t>(model_->config().vocab_size));
    EXPECT_TRUE(run.run->ReadLogits(0, logits).ok());
    return logits;
  }
  // A whole prefill: nothing of another one may be in its way.
  std::vector<float> LogitsAlone(uint32_t seed) {
    const auto run = Start(seed);
    while (!run->run->layers_done()) EXPECT_TRUE(Layer(*run).ok());
    EXPECT_THAT(run->log.events,
                ElementsAre("kv 0", "kv 1", "done 0", "kv 2", "done 1", "done 2"));
    return Logits(*run);
  }

  TinyModel tiny_{{.layers = 3}};
  std::unique_ptr<DeviceBackend> device_;
  std::unique_ptr<Model> model_;
};

TEST_F(PrefillAheadSpec, TellsOfALayerWhenTheNextOneHasBeenCalled) {
  Open();
  const auto run = Start();
  ASSERT_TRUE(Layer(*run).ok());
  EXPECT_EQ(run->run->next_layer(), 1);
  EXPECT_EQ(run->run->layers_finished(), 0);
  ASSERT_TRUE(Layer(*run).ok());
  EXPECT_EQ(run->run->next_layer(), 2);
  EXPECT_EQ(run->run->layers_finished(), 1);
  EXPECT_EQ(run->cache.num_tokens(), 0);
  ASSERT_TRUE(Layer(*run).ok());
  EXPECT_TRUE(run->run->layers_done());
  EXPECT_EQ(run->cache.num_tokens(), kTokens);
  EXPECT_THAT(run->log.events,
              ElementsAre("kv 0", "kv 1", "done 0", "kv 2", "done 1", "done 2"));
  EXPECT_GT(run->run->embed_seconds(), 0);
  for (const LayerReport& report : run->log.reports) {
    EXPECT_EQ(report.attention.Density(), 1.0);
    EXPECT_GT(report.qkv_seconds, 0);
    EXPECT_GT(report.mlp_seconds, 0);
    EXPECT_GE(report.seconds, report.qkv_seconds + report.mlp_seconds);
  }
}

TEST_F(PrefillAheadSpec, ARunThatHasCaughtUpLeavesTheBackendToAnother) {
  Open();
  const std::vector<float> expected = LogitsAlone(1);
  const std::vector<float> expected_other = LogitsAlone(2);
  const auto run = Start(1);
  for (int layer = 0; layer < 3; ++layer) {
    SCOPED_TRACE(layer);
    ASSERT_TRUE(Layer(*run).ok());
    ASSERT_TRUE(run->run->CatchUp(&run->log).ok());
    EXPECT_EQ(run->run->layers_finished(), layer + 1);
    EXPECT_EQ(LogitsAlone(2), expected_other);
  }
  EXPECT_THAT(run->log.events,
              ElementsAre("kv 0", "done 0", "kv 1", "done 1", "kv 2", "done 2"));
  EXPECT_EQ(Logits(*run), expected);
}

TEST_F(PrefillAheadSpec, CatchingUpWithNothingUnderWayTellsNothing) {
  Open();
  const auto run = Start();
  ASSERT_TRUE(run->run->CatchUp(&run->log).ok());
  ASSERT_TRUE(Layer(*run).ok());
  ASSERT_TRUE(run->run->CatchUp(&run->log).ok());
  ASSERT_TRUE(run->run->CatchUp(nullptr).ok());
  EXPECT_THAT(run->log.events, ElementsAre("kv 0", "done 0"));
}

TEST_F(PrefillAheadSpec, WhatGoesWrongInALayerIsToldWithTheNextOne) {
  for (int layer = 0; layer < 3; ++layer) {
    SCOPED_TRACE(layer);
    Open({.report_fails_at = layer + 1});
    {
      const auto run = Start();
      Status status;
      int calls = 0;
      while (status.ok() && !run->run->layers_done()) {
        status = Layer(*run);
        ++calls;
      }
      EXPECT_EQ(status.message(), "a report failed, as it was told to");
      EXPECT_EQ(calls, std::min(layer + 2, 3)) << "the last call waits for both";
      std::vector<std::string> expected = {"kv 0", "kv 1", "done 0", "kv 2", "done 1"};
      expected.resize(layer == 0 ? 2 : layer == 1 ? 4 : 5);
      EXPECT_EQ(run->log.events, expected);
      EXPECT_EQ(run->cache.num_tokens(), 0);
    }
    LogitsAlone(2);
  }
}

TEST_F(PrefillAheadSpec, CatchingUpTellsWhatWentWrong) {
  Open({.report_fails_at = 1});
  const auto run = Start();
  ASSERT_TRUE(Layer(*run).ok());
  EXPECT_EQ(run->run->CatchUp(&run->log).message(),
            "a report failed, as it was told to");
  EXPECT_THAT(run->log.events, ElementsAre("kv 0"));
}

TEST_F(PrefillAheadSpec, StoppedItIsSilentAboutTheLayerUnderWay) {
  Open();
  std::atomic<bool> stop = false;
  {
    const auto run = Start();
    run->log.on_kv_ready = [&](int32_t layer) {
      if (layer == 1) stop = true;
    };
    ASSERT_TRUE(Layer(*run, {.stop = &stop}).ok());
    EXPECT_EQ(Layer(*run, {.stop = &stop}).code(), StatusCode::kCancelled);
    EXPECT_THAT(run->log.events, ElementsAre("kv 0", "kv 1"));
    EXPECT_EQ(run->cache.num_tokens(), 0);
  }
  LogitsAlone(2);
}

TEST_F(PrefillAheadSpec, DestroyedItLeavesNoReportUnderWay) {
  Open();
  for (int calls = 1; calls <= 2; ++calls) {
    {
      const auto run = Start();
      for (int i = 0; i < calls; ++i) ASSERT_TRUE(Layer(*run).ok());
    }
    LogitsAlone(2);
  }
}

}  // namespace
}  // namespace pbs
