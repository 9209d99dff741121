// Spec: jobs of server/engine/engine.h on a backend with memory of its own: two layers
// of keys and values on the device, each brought to the held cache while the next ones
// run; a ledger for the device. Raw attention: device_attend_test.cc.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/device_backend.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing_support::DeviceBackend;

// An engine on a device, and one on the CPU to compare with (EngineFixture's).
class DeviceMemorySpec : public EngineFixture {
 protected:
  void Open(const testing_support::DevicePlan& plan = {}) {
    on_device_.reset();
    model_.replicas.clear();
    device_ = std::make_unique<DeviceBackend>(plan);
    model_.name = "tiny";
    model_.replicas.push_back(*Model::Load(folder_.path(), {}, *device_));
    model_.tokens_max = model_.model().config().max_tokens;
    on_device_ =
        std::make_unique<DeviceEngine>(EngineOptions{.queue_requests_max = kQueueMax},
                                       EngineParts{*device_, ledger_, clock_, timers_,
                                                   metrics_, costs_, &device_ledger_});
  }
  ~DeviceMemorySpec() override { EXPECT_EQ(device_ledger_.bytes_held(), 0); }

  PrefillJob MakeJob(int32_t num_tokens, AttentionOptions attention = Dense()) {
    PrefillJob job;
    job.model = &model_;
    job.tokens = Tokens(num_tokens);
    job.all_logits_last_token = true;
    auto reserved = on_device_->ReservePrefill(model_, {num_tokens, attention});
    EXPECT_TRUE(reserved.ok()) << reserved.status();
    job.kv = std::move(reserved->kv);
    job.reservation = std::move(reserved->workspace);
    return job;
  }
  void RunDevice() {
    while (on_device_->executor().RunOneStep()) {
    }
  }

  static constexpr int64_t kDeviceBytesMax = 8 << 20;
  testing_support::TinyModelFolder folder_;
  ByteLedger device_ledger_{kDeviceBytesMax};
  std::unique_ptr<DeviceBackend> device_;
  ServedModel model_;
  std::unique_ptr<DeviceEngine> on_device_;
  PrefillRecorder listener_;
};

TEST_F(DeviceMemorySpec, HeldCachesAndLogitsAreThoseOfACpu) {
  Open();
  PrefillJob job = MakeJob(40);
  const std::shared_ptr<HeldKv> kv = job.kv;
  ASSERT_TRUE(on_device_->SubmitPrefill(std::move(job), listener_).ok());
  RunDevice();
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();

  PrefillRecorder cpu;
  PrefillJob same = MakePrefill(40);
  same.all_logits_last_token = true;
  const std::shared_ptr<HeldKv> expected = same.kv;
  ASSERT_TRUE(engine_.SubmitPrefill(std::move(same), cpu).ok());
  RunAll();
  EXPECT_EQ(listener_.result->last_token_logits, cpu.result->last_token_logits);
  EXPECT_EQ(kv->cache().num_tokens(), 40);
  const auto bytes = static_cast<size_t>(kv->cache().shape().plane_bytes());
  for (int32_t layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(std::memcmp(kv->cache().k(layer), expected->cache().k(layer), bytes), 0);
    EXPECT_EQ(std::memcmp(kv->cache().v(layer), expected->cache().v(layer), bytes), 0);
  }
}

TEST_F(DeviceMemorySpec, LayersAreHeardOfInOrderAndAllBeforeTheEnd) {
  Open();
  std::vector<int32_t> held;
  KvFollower follower([&](int32_t layer) { held.push_back(layer); });
  PrefillJob job = MakeJob(30);
  const std::shared_ptr<HeldKv> kv = job.kv;
  follower.Follow(*kv);
  ASSERT_TRUE(on_device_->SubmitPrefill(std::move(job), listener_).ok());
  RunDevice();
  EXPECT_THAT(held, ElementsAre(0, 1, 2));
  EXPECT_EQ(listener_.events.back(), "done OK");
  EXPECT_EQ(listener_.events.size(), 4u);
}

// Keys are even, values odd; layers 0, 1, 2.
TEST_F(DeviceMemorySpec,
       ALayerThatDoesNotArriveFailsThePrefillAndNothingBehindItIsSeen) {
  for (int fails_at = 1; fails_at <= 6; ++fails_at) {
    SCOPED_TRACE(fails_at);
    PrefillRecorder listener;
    Open({.download_fails_at = fails_at});
    PrefillJob job = MakeJob(30);
    const std::shared_ptr<HeldKv> kv = job.kv;
    ASSERT_TRUE(on_device_->SubmitPrefill(std::move(job), listener).ok());
    RunDevice();
    EXPECT_EQ(listener.result.status(),
              absl::UnavailableError("a download failed, as it was told to"));
    EXPECT_EQ(kv->layers_ready(), (fails_at - 1) / 2);
    EXPECT_TRUE(kv->finished());
    EXPECT_EQ(kv->status().code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ(device_ledger_.bytes_held(), 0);
  }
}

// The host is a layer ahead: a step tells of the layer before.
TEST_F(DeviceMemorySpec, LayersAreDoneInOrderOneStepLater) {
  Open();
  PrefillRecorder layers;
  ASSERT_TRUE(on_device_->SubmitPrefill(MakeJob(30), layers).ok());
  ASSERT_TRUE(on_device_->executor().RunOneStep());
  EXPECT_THAT(layers.events, ElementsAre());
  ASSERT_TRUE(on_device_->executor().RunOneStep());
  EXPECT_THAT(layers.events, ElementsAre("layer 0"));
  RunDevice();
  EXPECT_THAT(layers.events, ElementsAre("layer 0", "layer 1", "layer 2", "done OK"));
  ASSERT_EQ(layers.result->layers.size(), 3u);
}

// Whoever comes between two of its layers uses the same marks and reports.
TEST_F(DeviceMemorySpec, AnOvertakenPrefillIsSetAsideAndGivesTheSameBits) {
  Open();
  PrefillRecorder layers, alone, urgent;
  ASSERT_TRUE(on_device_->SubmitPrefill(MakeJob(150, SmallPbs()), alone).ok());
  RunDevice();
  ASSERT_TRUE(on_device_->SubmitPrefill(MakeJob(150, SmallPbs()), layers).ok());
  for (int layer = 0; layer < 2; ++layer) {
    ASSERT_TRUE(on_device_->executor().RunOneStep());
    PrefillJob job = MakeJob(80, SmallPbs());
    job.terms.priority = 1;
    urgent.events.clear();
    ASSERT_TRUE(on_device_->SubmitPrefill(std::move(job), urgent).ok());
    ASSERT_TRUE(on_device_->executor().RunOneStep());
    EXPECT_EQ(layers.events.back(), "layer " + std::to_string(layer));
    while (urgent.events.size() < 4) {
      ASSERT_TRUE(on_device_->executor().RunOneStep());
    }
    EXPECT_THAT(urgent.events, ElementsAre("layer 0", "layer 1", "layer 2", "done OK"));
  }
  RunDevice();
  EXPECT_THAT(layers.events, ElementsAre("layer 0", "layer 1", "layer 2", "done OK"));
  EXPECT_EQ(layers.result->last_token_logits, alone.result->last_token_logits);
  for (size_t layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(layers.result->layers[layer].executed_blocks,
              alone.result->layers[layer].executed_blocks);
  }
}

TEST_F(DeviceMemorySpec, WhatGoesWrongInALayerEndsThePrefillAndNobodyElse) {
  for (int layer = 0; layer < 3; ++layer) {
    for (const bool overtaken : {false, true}) {
      SCOPED_TRACE(testing::Message()
                   << "layer " << layer << ", overtaken " << overtaken);
      PrefillRecorder wrong, urgent;
      Open({.report_fails_at = layer + 1});
      PrefillJob job = MakeJob(30);
      const std::shared_ptr<HeldKv> kv = job.kv;
      ASSERT_TRUE(on_device_->SubmitPrefill(std::move(job), wrong).ok());
      for (int step = 0; overtaken && step <= layer; ++step) {
        ASSERT_TRUE(on_device_->executor().RunOneStep());
      }
      PrefillJob other = MakeJob(20);
      other.terms.priority = overtaken ? 1 : 0;
      ASSERT_TRUE(on_device_->SubmitPrefill(std::move(other), urgent).ok());
      RunDevice();
      EXPECT_EQ(wrong.result.status(),
                absl::InvalidArgumentError("a report failed, as it was told to"));
      EXPECT_EQ(wrong.events.size(), static_cast<size_t>(layer) + 1);
      EXPECT_EQ(kv->status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_LE(kv->layers_ready(), std::min(layer + 2, 3));
      EXPECT_TRUE(urgent.result.ok()) << urgent.result.status();
      EXPECT_EQ(device_ledger_.bytes_held(), 0);
    }
  }
}

TEST_F(DeviceMemorySpec, CancellingGivesBackBothKindsOfMemory) {
  Open();
  PrefillJob job = MakeJob(30);
  EXPECT_GT(device_ledger_.bytes_held(), 0);
  const auto admission = on_device_->SubmitPrefill(std::move(job), listener_);
  ASSERT_TRUE(admission.ok());
  ASSERT_TRUE(on_device_->executor().RunOneStep());
  on_device_->Cancel(admission->id, CancelReason::kCaller);
  RunDevice();
  EXPECT_EQ(listener_.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(device_ledger_.bytes_held(), 0);
  EXPECT_EQ(ledger_.bytes_held(), 0);
  // Nothing of it is in the way of the next one.
  PrefillRecorder next;
  ASSERT_TRUE(on_device_->SubmitPrefill(MakeJob(20), next).ok());
  RunDevice();
  EXPECT_TRUE(next.result.ok()) << next.result.status();
}

TEST_F(DeviceMemorySpec, WhatCannotFitTheDeviceIsRefusedByItsLedger) {
  Open();
  const auto refused = on_device_->ReservePrefill(model_, {8000, Dense()});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

}  // namespace
}  // namespace pbs::server
