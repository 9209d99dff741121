// Spec: the life of pbs-prefilld (server/main.cc): how it starts, refuses to start,
// drains and ends. Every case is a process of its own.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <future>
#include <string>
#include <thread>
#include <vector>

#include "client/cpp/client.h"
#include "tests/support/case_name.h"
#include "tests/support/server_process.h"
#include "tests/support/tiny_model.h"

namespace pbs {
namespace {

using testing::HasSubstr;
using testing_support::ServerProcess;
using testing_support::TinyModelFolder;

std::vector<std::string> With(std::vector<std::string> arguments,
                              const std::vector<std::string>& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

class DaemonSpec : public testing::Test {
 protected:
  // No metrics port: closing one takes up to two seconds.
  std::vector<std::string> Usual() const {
    return {"--backend",        "cpu", "--threads", "1",
            "--metrics-listen", "off", "--model",   "tiny=" + folder_.path()};
  }
  static std::unique_ptr<client::Client> Connect(ServerProcess& server) {
    const nlohmann::json serving = server.WaitForEvent("serving");
    EXPECT_TRUE(serving.is_object()) << "it did not start";
    auto connected = client::Client::Connect({.address = serving.value("listen", "")});
    EXPECT_TRUE(connected.ok()) << connected.status();
    return *std::move(connected);
  }
  static v1::PrefillRequest Request(int num_tokens, bool lease) {
    v1::PrefillRequest request;
    for (int i = 0; i < num_tokens; ++i) {
      request.add_token_ids(static_cast<uint32_t>(i % 128));
    }
    if (lease) request.mutable_delivery()->mutable_lease();
    return request;
  }
  // A finished prefill whose lease is held.
  static v1::KvTicket HoldLease(client::Client& client) {
    client::PrefillObserver observer;
    const auto done = client.Prefill(Request(20, true), observer);
    EXPECT_TRUE(done.ok()) << done.status();
    return done->ticket();
  }

  const TinyModelFolder folder_;
};

// ---- start

TEST_F(DaemonSpec, ServesItsModels) {
  ServerProcess server(PBS_PREFILLD, Usual());
  const auto client = Connect(server);
  const auto models = client->ListModels();
  ASSERT_TRUE(models.ok()) << models.status();
  ASSERT_EQ(models->models_size(), 1);
  EXPECT_EQ(models->models(0).name(), "tiny");
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
}

TEST_F(DaemonSpec, WithoutAModelServesRawAttention) {
  ServerProcess server(PBS_PREFILLD, {"--threads", "1", "--metrics-listen", "off"});
  const auto client = Connect(server);
  EXPECT_EQ(client->ListModels()->models_size(), 0);
  EXPECT_TRUE(server.WaitForEvent("backend_auto").is_object());
  server.Signal(SIGINT);
  EXPECT_EQ(server.Wait(), 0);
}

struct RefusalCase {
  const char* name;
  std::vector<std::string> arguments;
  int exit_status;
  const char* message;  // part of start_failed's; "" when it ends before its log
};

class RefusedStartSpec : public DaemonSpec,
                         public testing::WithParamInterface<RefusalCase> {};

TEST_P(RefusedStartSpec, EndsWithTheReason) {
  ServerProcess server(PBS_PREFILLD,
                       With({"--metrics-listen", "off"}, GetParam().arguments));
  if (GetParam().message[0] != '\0') {
    const nlohmann::json failed = server.WaitForEvent("start_failed");
    ASSERT_TRUE(failed.is_object());
    EXPECT_THAT(failed.value("message", ""), HasSubstr(GetParam().message));
  }
  EXPECT_EQ(server.Wait(), GetParam().exit_status);
}

INSTANTIATE_TEST_SUITE_P(
    Reasons, RefusedStartSpec,
    testing::Values(
        RefusalCase{"missing_model", {"--model", "x=/nowhere"}, 1, "model x: "},
        RefusalCase{"cuda", {"--backend", "cuda"}, 1, "not part of this build"},
        RefusalCase{"foreign_address", {"--listen", "192.0.2.1:1"}, 1, "192.0.2.1:1"},
        RefusalCase{"foreign_metrics_address",
                    {"--metrics-listen", "192.0.2.1:1"},
                    1,
                    "metrics_listen 192.0.2.1:1 cannot be bound"},
        RefusalCase{"unknown_flag", {"--frob"}, 2, ""},
        RefusalCase{"model_without_path", {"--model", "x"}, 2, ""},
        RefusalCase{"missing_config", {"--config", "/nowhere.json"}, 2, ""},
        RefusalCase{"bad_set", {"--set", "lease.ttl=1"}, 2, ""},
        RefusalCase{"invalid_config", {"--set", "lease.leases_max=0"}, 2, ""},
        RefusalCase{"valid_config", {"--check-config"}, 0, ""}),
    testing_support::CaseName());

// ---- drain

TEST_F(DaemonSpec, DrainServesHeldLeasesAndRefusesNewWork) {
  ServerProcess server(PBS_PREFILLD, Usual());
  const auto client = Connect(server);
  const v1::KvTicket ticket = HoldLease(*client);
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForEvent("draining").is_object());

  client::PrefillObserver observer;
  absl::Status refused;
  do {  // the event is written a moment before the door closes
    refused = client->Prefill(Request(20, false), observer).status();
  } while (refused.ok());
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(client->Describe(ticket).ok());
  EXPECT_TRUE(client->Release(ticket).ok());
  EXPECT_EQ(server.Wait(), 0);  // at once: a minute is allowed
  EXPECT_TRUE(server.WaitForEvent("drained").value("leases_released", false));
}

TEST_F(DaemonSpec, DrainEndsAtItsLimit) {
  ServerProcess server(PBS_PREFILLD, With(Usual(), {"--set", "drain_seconds_max=0"}));
  HoldLease(*Connect(server));
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_FALSE(server.WaitForEvent("drained").value("leases_released", true));
}

TEST_F(DaemonSpec, ASecondSignalEndsItAtOnce) {
  ServerProcess server(PBS_PREFILLD, Usual());
  HoldLease(*Connect(server));
  server.Signal(SIGTERM);
  ASSERT_TRUE(server.WaitForEvent("draining").is_object());
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(), 128 + SIGTERM);
}

TEST_F(DaemonSpec, DrainUnderLoadLosesNoAdmittedRequest) {
  struct Gate final : client::PrefillObserver {
    void OnAdmitted(const v1::Admitted&) override { admitted.set_value(); }
    std::promise<void> admitted;
  };
  ServerProcess server(PBS_PREFILLD, Usual());
  const auto client = Connect(server);
  constexpr int kRequests = 6;
  Gate gates[kRequests];
  std::vector<absl::Status> results(kRequests);
  std::vector<std::thread> callers;
  for (int i = 0; i < kRequests; ++i) {
    callers.emplace_back([&, i] {
      results[i] = client->Prefill(Request(2000, false), gates[i]).status();
    });
  }
  for (Gate& gate : gates) gate.admitted.get_future().wait();
  server.Signal(SIGTERM);
  for (std::thread& caller : callers) caller.join();
  for (const absl::Status& result : results) EXPECT_TRUE(result.ok()) << result;
  EXPECT_EQ(server.Wait(), 0);
  EXPECT_TRUE(server.WaitForEvent("drained").value("work_finished", false));
}

}  // namespace
}  // namespace pbs
