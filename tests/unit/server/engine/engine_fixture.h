// An engine on the real CPU backend with a tiny random model. The test takes the steps,
// and listeners record their calls.
#pragma once

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pbs/cpu_backend.h"
#include "server/engine/device_engine.h"
#include "tests/support/tiny_model.h"

namespace pbs::server {

// The tests of a program share one model, because loading it costs more than a test.
struct TestModel {
  static ServedModel& Get() {
    static TestModel model;
    return model.served_;
  }
  static Backend& TheBackend() { return Get().model().backend(); }

 private:
  TestModel() {
    backend_ = *CreateCpuBackend({.num_threads = 1});
    served_.name = "tiny";
    served_.replicas.push_back(*Model::Load(folder_.path(), {}, *backend_));
    served_.tokens_max = served_.model().config().max_tokens;
  }

  testing_support::TinyModelFolder folder_;
  std::unique_ptr<Backend> backend_;
  ServedModel served_;
};

struct PrefillRecorder final : PrefillListener {
  void OnLayerDone(int32_t layer, double, double) override {
    events.push_back("layer " + std::to_string(layer));
    if (on_layer_done) on_layer_done(layer);
  }
  void OnDone(absl::StatusOr<PrefillResult> done) override {
    events.push_back("done " + absl::StatusCodeToString(done.status().code()));
    result = std::move(done);
    ++num_done;
  }

  std::function<void(int32_t)> on_layer_done;
  std::vector<std::string> events;
  absl::StatusOr<PrefillResult> result = absl::UnknownError("not done");
  int num_done = 0;
};

// Calls `on_layer` for every layer of a cache as it is published.
class KvFollower {
 public:
  explicit KvFollower(std::function<void(int32_t)> on_layer)
      : on_layer_(std::move(on_layer)) {}
  void Follow(HeldKv& kv, int32_t layer = 0) {
    kv.WhenReady(layer, [this, &kv, layer] {
      if (kv.layers_ready() <= layer) return;  // the prefill has finished
      on_layer_(layer);
      Follow(kv, layer + 1);
    });
  }

 private:
  const std::function<void(int32_t)> on_layer_;
};

struct AttendRecorder final : AttendListener {
  void OnDone(absl::StatusOr<AttendResult> done) override {
    result = std::move(done);
    ++num_done;
  }

  absl::StatusOr<AttendResult> result = absl::UnknownError("not done");
  int num_done = 0;
};

class EngineFixture : public testing::Test {
 protected:
  static constexpr int32_t kQueueMax = 4;
  static constexpr int64_t kBytesMax = 64 << 20;

  ~EngineFixture() override { EXPECT_EQ(ledger_.bytes_held(), 0); }

  static std::vector<int32_t> Tokens(int32_t count, uint32_t seed = 1) {
    std::mt19937 random(seed);
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 128);
    return tokens;
  }

  // A job with its memory reserved.
  PrefillJob MakePrefill(int32_t num_tokens, AttentionOptions attention = Dense()) {
    PrefillJob job;
    job.model = &TestModel::Get();
    job.tokens = Tokens(num_tokens);
    auto reserved = engine_.ReservePrefill(*job.model, {num_tokens, attention});
    EXPECT_TRUE(reserved.ok()) << reserved.status();
    job.kv = std::move(reserved->kv);
    job.reservation = std::move(reserved->workspace);
    return job;
  }
  static AttentionOptions Dense() {
    AttentionOptions options;
    options.method = Method::kDense;
    return options;
  }
  static AttentionOptions SmallPbs() {
    AttentionOptions options;
    options.block_size = 16;
    options.segment_size = 32;
    options.threshold = 0.6f;
    return options;
  }

  void RunAll() {
    while (engine_.executor().RunOneStep()) {
    }
  }
  void RunSteps(int count) {
    for (int i = 0; i < count; ++i) ASSERT_TRUE(engine_.executor().RunOneStep());
  }

  ManualClock clock_;
  TimerQueue timers_{clock_};
  prometheus::Registry registry_;
  ServerMetrics metrics_{registry_};
  ByteLedger ledger_{kBytesMax};
  CostModel costs_;
  DeviceEngine engine_{
      {.queue_requests_max = kQueueMax},
      {TestModel::TheBackend(), ledger_, clock_, timers_, metrics_, costs_}};
};

}  // namespace pbs::server
