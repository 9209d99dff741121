// A whole node in this process: real engine, real CPU backend, tiny random model, real
// gRPC over loopback. Time stands still until a test advances it. The test takes the
// executor's steps itself or lets a thread take them.
#pragma once

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "client/cpp/client.h"
#include "pbs/cpu_backend.h"
#include "server/base/random_id.h"
#include "server/engine/device_engine.h"
#include "server/engine/replicated_engine.h"
#include "server/service/server.h"
#include "server/transfer/lease_store.h"
#include "tests/support/kv_arrays.h"
#include "tests/support/tiny_model.h"

namespace pbs::server {

using testing_support::KvArrays;

// One backend and one model for all tests of a program: loading costs more than a test.
struct SharedModel {
  static SharedModel& Get() {
    static SharedModel model;
    return model;
  }

  testing_support::TinyModelFolder folder;
  std::unique_ptr<Backend> backend;
  ServedModel served;

 private:
  SharedModel() {
    backend = *CreateCpuBackend({.num_threads = 1});
    served.name = "tiny";
    served.replicas.push_back(*Model::Load(folder.path(), {}, *backend));
    served.tokens_max = 4096;
  }
};

// Waits for a condition that another thread will meet. It returns as soon as the
// condition holds; only a failure takes long.
template <class Condition>
[[nodiscard]] bool Eventually(const Condition& condition) {
  const absl::Time give_up = absl::Now() + absl::Seconds(30);
  while (!condition()) {
    if (absl::Now() > give_up) return false;
    std::this_thread::yield();
  }
  return true;
}

// A test's clock leaps, and a write under way would then look stalled. So the limit is
// very large in tests of other subjects.
inline ServiceOptions PatientService() {
  ServiceOptions options;
  options.transport.write_stall_seconds_max = 3600;
  return options;
}

struct NodeOptions {
  ServiceOptions service = PatientService();
  LeaseOptions leases = {};
  int64_t memory_bytes_max = 256 << 20;
  int32_t queue_requests_max = 16;
  BatchLimits batch = {};       // every prompt runs alone
  bool executor_thread = true;  // else the test steps by hand
  bool ready = true;            // models set, serving
  bool shared_caches = false;
};

class TestNode {
 public:
  explicit TestNode(NodeOptions options = {})
      : ledger(options.memory_bytes_max),
        engine({.queue_requests_max = options.queue_requests_max,
                .batch = options.batch,
                .shared_caches = options.shared_caches},
               {*SharedModel::Get().backend, ledger, clock, timers, metrics, costs}),
        leases(options.leases, RandomU64(), clock, timers, metrics.kv) {
    options.service.listen = "127.0.0.1:0";
    auto created = GrpcServer::Create(
        options.service, {engines, leases, ledger, metrics, *log, clock, timers});
    EXPECT_TRUE(created.ok()) << created.status();
    server = *std::move(created);
    if (options.ready) {
      server->SetModels({&SharedModel::Get().served});
      server->SetServing(true);
    }
    if (options.executor_thread) executor_thread.emplace(engine.executor());
  }
  ~TestNode() {
    if (server != nullptr) Stop();
  }

  // All charged bytes must be free once no lease is held.
  void Stop() {
    server->Shutdown(absl::ZeroDuration());
    executor_thread.reset();
    server.reset();
  }

  std::string address() const { return "127.0.0.1:" + std::to_string(server->port()); }
  std::shared_ptr<grpc::Channel> NewChannel() const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetMaxReceiveMessageSize(-1);
    return grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(),
                                     arguments);
  }
  // The window stays at 64 KiB per stream, because gRPC's probe is off. Unread bytes
  // then stay at the server.
  std::shared_ptr<grpc::Channel> NewNarrowChannel() const {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    return grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(),
                                     arguments);
  }
  std::unique_ptr<client::Client> NewClient() const {
    auto connected = client::Client::Connect({.address = address()});
    EXPECT_TRUE(connected.ok()) << connected.status();
    return *std::move(connected);
  }

  // Takes steps by hand until `condition` holds.
  template <class Condition>
  [[nodiscard]] bool StepUntil(const Condition& condition) {
    return Eventually([&] {
      if (condition()) return true;
      engine.executor().RunOneStep();
      return condition();
    });
  }
  // All calls are over and nothing is charged any more.
  [[nodiscard]] bool NothingHeld() {
    return Eventually([&] { return ledger.bytes_held() == 0; });
  }
  void Advance(absl::Duration duration) {
    clock.Advance(duration);
    timers.RunDue();
  }
  // All logged lines; nothing may be logged afterwards.
  std::string FlushedLog() {
    log.reset();
    return log_text.str();
  }
  double Waiting() const { return metrics.engine.waiting.Value(); }
  double Running() const { return metrics.engine.running.Value(); }

  ManualClock clock;
  TimerQueue timers{clock};
  std::ostringstream log_text;
  std::optional<Log> log{std::in_place, LogLevel::kInfo, log_text};
  prometheus::Registry registry;
  ServerMetrics metrics{registry};
  ByteLedger ledger;
  CostModel costs;
  DeviceEngine engine;
  ReplicatedEngine engines{{&engine}, metrics.engine};
  LeaseStore leases;
  std::unique_ptr<GrpcServer> server;
  std::optional<ExecutorThread> executor_thread;
};

// ---- requests

inline v1::PrefillRequest PrefillOf(int32_t num_tokens, uint32_t seed = 1) {
  v1::PrefillRequest request;
  request.set_request_id("test");
  std::mt19937 random(seed);
  for (int32_t i = 0; i < num_tokens; ++i) request.add_token_ids(random() % 128);
  return request;
}
inline v1::PrefillRequest LeaseOf(int32_t num_tokens, uint32_t seed = 1) {
  v1::PrefillRequest request = PrefillOf(num_tokens, seed);
  request.mutable_delivery()->mutable_lease();
  return request;
}

struct PrefillEvents final : client::PrefillObserver {
  void OnAdmitted(const v1::Admitted& event) override {
    admitted = event;
    if (on_admitted) on_admitted(event);
  }
  void OnLayer(const v1::LayerDone& event) override { layers.push_back(event); }

  std::optional<v1::Admitted> admitted;
  std::vector<v1::LayerDone> layers;
  std::function<void(const v1::Admitted&)> on_admitted;
};

}  // namespace pbs::server
