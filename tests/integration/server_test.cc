// Spec: server/service/server.h: the node's life, health, reflection and settings.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <span>
#include <string>

#include "grpc/health/v1/health.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "server/base/grpc_status.h"
#include "server/service/call_record.h"
#include "tests/integration/test_node.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

namespace health = grpc::health::v1;
using Status = health::HealthCheckResponse;

// The status, or UNKNOWN for a service that the server does not know.
Status::ServingStatus Check(const TestNode& node, const std::string& service) {
  auto stub = health::Health::NewStub(node.NewChannel());
  grpc::ClientContext context;
  health::HealthCheckRequest request;
  request.set_service(service);
  health::HealthCheckResponse response;
  const grpc::Status status = stub->Check(&context, request, &response);
  if (status.error_code() == grpc::StatusCode::NOT_FOUND) return Status::UNKNOWN;
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.status();
}

TEST(HealthSpec, IsNotServingUntilToldAndLiveFromTheStart) {
  TestNode node({.ready = false});
  EXPECT_EQ(Check(node, "liveness"), Status::SERVING);
  for (const char* service :
       {"", "pbs.v1.Prefill", "pbs.v1.Attention", "pbs.v1.KvSource"}) {
    EXPECT_EQ(Check(node, service), Status::NOT_SERVING) << service;
  }
  node.server->SetServing(true);
  for (const char* service :
       {"", "pbs.v1.Prefill", "pbs.v1.Attention", "pbs.v1.KvSource"}) {
    EXPECT_EQ(Check(node, service), Status::SERVING) << service;
  }
  EXPECT_EQ(Check(node, "pbs.v1.Other"), Status::UNKNOWN);
}

TEST(HealthSpec, AWatchTellsEveryChangeAndDoesNotHoldUpTheEnd) {
  TestNode node({.ready = false});
  auto stub = health::Health::NewStub(node.NewChannel());
  grpc::ClientContext context, unknown_context;
  health::HealthCheckRequest request;
  auto watch = stub->Watch(&context, request);
  health::HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), Status::NOT_SERVING);
  node.server->SetServing(true);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), Status::SERVING);

  request.set_service("other");
  auto unknown = stub->Watch(&unknown_context, request);
  ASSERT_TRUE(unknown->Read(&response));
  EXPECT_EQ(response.status(), Status::SERVICE_UNKNOWN);

  node.server->Shutdown(absl::Hours(1));  // returns at once: watchers are sent home
  EXPECT_FALSE(watch->Read(&response));
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(HealthSpec, ALongServiceNameIsRefusedAndNotKept) {
  TestNode node;
  auto stub = health::Health::NewStub(node.NewChannel());
  grpc::ClientContext check_context, watch_context;
  health::HealthCheckRequest request;
  request.set_service(std::string(129, 's'));
  health::HealthCheckResponse response;
  const grpc::Status check = stub->Check(&check_context, request, &response);
  auto watch = stub->Watch(&watch_context, request);
  EXPECT_FALSE(watch->Read(&response));
  for (const grpc::Status& status : {check, watch->Finish()}) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(status.error_message(), "service has 129 bytes, more than 128");
  }
}

TEST(LoadingSpec, EveryCallSaysThatModelsAreLoading) {
  TestNode node({.ready = false});
  auto client = node.NewClient();
  PrefillEvents events;
  KvArrays arrays;
  v1::FetchRequest fetch;
  v1::AttendHeader attend;
  struct NoTarget final : client::TensorTarget {
    std::span<std::byte> Tensor(const v1::TensorSpec&, int64_t) override { return {}; }
  } target;
  const absl::Status expected = absl::UnavailableError("loading models");
  EXPECT_EQ(client->GetServerInfo().status(), expected);
  EXPECT_EQ(client->ListModels().status(), expected);
  EXPECT_EQ(client->Prefill(PrefillOf(5), events).status(), expected);
  EXPECT_EQ(client->Attend(attend, {}, target).status(), expected);
  EXPECT_EQ(client->Describe({}).status(), expected);
  EXPECT_EQ(client->Release({}), expected);
  EXPECT_EQ(node.metrics.engine.Rejected(RejectReason::kLoading).Value(), 2);
  node.server->SetModels({&SharedModel::Get().served});
  EXPECT_TRUE(client->GetServerInfo().ok());
}

TEST(InfoSpec, SaysWhatTheServerIs) {
  NodeOptions options;
  options.service.version = "1.2.3";
  options.service.commit = "abc";
  options.service.backend = {"cpu",    "avx2",        "test",
                             {32, 64}, {DType::kF32}, {Method::kDense, Method::kPrism}};
  TestNode node(options);
  const auto info = node.NewClient()->GetServerInfo();
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->version(), "1.2.3");
  EXPECT_EQ(info->protocol_version(), "1.1");
  EXPECT_EQ(info->epoch(), node.leases.epoch());
  EXPECT_EQ(info->backends(0).isa(), "avx2");
  EXPECT_THAT(info->methods(), testing::ElementsAre(v1::DENSE, v1::PRISM));
  EXPECT_EQ(info->limits().receive_message_bytes_max(), (5 << 20) + (64 << 10));
  EXPECT_EQ(info->limits().memory_bytes_max(), 256 << 20);
  EXPECT_EQ(info->default_attention().xattention().block_size(), 64);
  // Prefill and Attend differ, and no profile says otherwise.
  EXPECT_FALSE(info->default_attention().has_dense_fallback());
}

TEST(InfoSpec, SaysTheDenseFallbackThatTheProfileSets) {
  NodeOptions options;
  options.service.default_attention.dense_fallback = false;
  TestNode node(options);
  const auto info = node.NewClient()->GetServerInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_TRUE(info->default_attention().has_dense_fallback());
  EXPECT_FALSE(info->default_attention().dense_fallback());
}

TEST(InfoSpec, ListsModels) {
  TestNode node;
  const auto list = node.NewClient()->ListModels();
  ASSERT_TRUE(list.ok());
  ASSERT_EQ(list->models_size(), 1);
  const v1::ModelInfo& model = list->models(0);
  EXPECT_EQ(model.name(), "tiny");
  EXPECT_EQ(model.architecture(), "llama");
  EXPECT_EQ(model.num_layers(), 3);
  EXPECT_EQ(model.tokens_max(), 4096);
  EXPECT_EQ(model.kv_bytes_per_token(), 2 * 3 * 2 * 32 * 4);
  EXPECT_THAT(model.eos_token_ids(), testing::ElementsAre(1));
}

TEST(AttentionOnlySpec, AServerWithoutModelsServesAttention) {
  TestNode node({.ready = false});
  node.server->SetModels({});
  PrefillEvents events;
  EXPECT_EQ(node.NewClient()->Prefill(PrefillOf(5), events).status(),
            absl::NotFoundError("this server has no model: attention only"));
  EXPECT_EQ(node.NewClient()->ListModels()->models_size(), 0);
}

TEST(DrainSpec, NewWorkIsRefusedWhileLeasesAreServed) {
  TestNode node;
  auto client = node.NewClient();
  PrefillEvents events;
  const auto done = client->Prefill(LeaseOf(50), events);
  ASSERT_TRUE(done.ok());
  node.server->Drain();
  EXPECT_EQ(client->Prefill(PrefillOf(5), events).status(),
            absl::UnavailableError("draining: this server takes no new work"));
  EXPECT_EQ(node.metrics.engine.Rejected(RejectReason::kDraining).Value(), 1);
  v1::FetchRequest fetch;
  *fetch.mutable_ticket() = done->ticket();
  KvArrays arrays;
  EXPECT_TRUE(client->Fetch(fetch, arrays).ok());
  EXPECT_TRUE(client->Release(done->ticket()).ok());
}

TEST(IdempotencySpec, TheSameKeyGivesTheSameTicketAndTokenWithoutWork) {
  TestNode node;
  auto client = node.NewClient();
  v1::PrefillRequest request = LeaseOf(90);
  request.set_idempotency_key("key");
  request.set_top_logits(2);
  PrefillEvents events, again_events;
  const auto first = client->Prefill(request, events);
  ASSERT_TRUE(first.ok()) << first.status();
  const double tokens = node.metrics.engine.prompt_tokens.Value();
  request.set_request_id("another try");
  const auto again = client->Prefill(request, again_events);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->ticket().handle(), first->ticket().handle());
  EXPECT_EQ(again->first_token_id(), first->first_token_id());
  EXPECT_EQ(again->top_logits_size(), 2);
  EXPECT_EQ(again_events.admitted->ticket().handle(), first->ticket().handle());
  EXPECT_EQ(node.metrics.engine.prompt_tokens.Value(), tokens);

  request.set_token_ids(0, request.token_ids(0) ^ 1);
  EXPECT_EQ(client->Prefill(request, events).status(),
            absl::InvalidArgumentError(
                "idempotency_key is in use by a request that differs from this one"));
  ASSERT_TRUE(client->Release(first->ticket()).ok());
  EXPECT_TRUE(node.NothingHeld());
}

TEST(IdempotencySpec, ARepeatedReplyIsChargedToo) {
  TestNode node;
  auto client = node.NewClient();
  v1::PrefillRequest request = LeaseOf(90);
  request.set_idempotency_key("key");
  PrefillEvents events;
  const auto first = client->Prefill(request, events);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(Eventually([&] { return node.Running() == 0; }));
  const int64_t held = node.ledger.bytes_held();
  auto others = node.ledger.Reserve(node.ledger.bytes_max() - held);
  ASSERT_TRUE(others.ok()) << others.status();
  EXPECT_TRUE(absl::IsResourceExhausted(client->Prefill(request, events).status()));
  EXPECT_EQ(node.metrics.engine.Rejected(RejectReason::kMemory).Value(), 1);
  others->Reset();
  const auto again = client->Prefill(request, events);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->ticket().handle(), first->ticket().handle());
  EXPECT_TRUE(Eventually([&] { return node.ledger.bytes_held() == held; }));
}

TEST(IdempotencySpec, AKeyWhoseWorkRunsIsAborted) {
  TestNode node({.executor_thread = false});
  auto client = node.NewClient();
  v1::PrefillRequest request = LeaseOf(90);
  request.set_idempotency_key("key");
  auto first = std::async(std::launch::async, [&] {
    PrefillEvents events;
    return client->Prefill(request, events).status();
  });
  ASSERT_TRUE(Eventually([&] { return node.Waiting() == 1; }));
  PrefillEvents events;
  EXPECT_EQ(
      node.NewClient()->Prefill(request, events).status(),
      absl::AbortedError("the request with this idempotency_key is already running"));
  ASSERT_TRUE(node.StepUntil([&] {
    return first.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }));
  EXPECT_TRUE(first.get().ok());
}

TEST(AdmissionSpec, LeasesAndQueueHaveLimits) {
  NodeOptions options;
  options.leases.leases_max = 1;
  options.queue_requests_max = 1;
  options.executor_thread = false;
  TestNode node(options);
  auto client = node.NewClient();
  auto first = std::async(std::launch::async, [&] {
    PrefillEvents events;
    return client->Prefill(LeaseOf(20), events).status();
  });
  ASSERT_TRUE(Eventually([&] { return node.Waiting() == 1; }));
  PrefillEvents events;
  EXPECT_EQ(node.NewClient()->Prefill(LeaseOf(20), events).status(),
            absl::ResourceExhaustedError("leases held 1 reach leases_max 1"));
  EXPECT_EQ(node.metrics.engine.Rejected(RejectReason::kLeases).Value(), 1);
  EXPECT_TRUE(absl::IsResourceExhausted(
      node.NewClient()->Prefill(PrefillOf(20), events).status()));
  ASSERT_TRUE(node.StepUntil([&] {
    return first.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }));
}

// Whether the server knows the reflection service: without it the method is unknown.
bool HasReflection(const TestNode& node) {
  client::RawStream stream(
      node.NewChannel(),
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", {});
  stream.WritesDone();
  grpc::ByteBuffer message;
  EXPECT_FALSE(stream.Read(&message));
  return !absl::IsUnimplemented(stream.Finish());
}

TEST(ReflectionSpec, IsOffUnlessConfiguredWhateverTheProcessDidBefore) {
  NodeOptions with;
  with.service.reflection = true;
  EXPECT_FALSE(HasReflection(TestNode()));
  EXPECT_TRUE(HasReflection(TestNode(with)));
  EXPECT_FALSE(HasReflection(TestNode()));
}

TEST(CompressionSpec, CompressedMessagesAreRefusedBeforeTheyGrow) {
  TestNode node;
  auto stub = v1::Prefill::NewStub(node.NewChannel());
  grpc::ClientContext context;
  context.set_compression_algorithm(GRPC_COMPRESS_GZIP);
  auto reader = stub->Prefill(&context, PrefillOf(2000));
  v1::PrefillEvent event;
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST(ListenSpec, ATakenAddressIsSaidSo) {
  TestNode node;
  ServiceOptions options;
  options.listen = node.address();
  const auto second =
      GrpcServer::Create(options, {node.engines, node.leases, node.ledger, node.metrics,
                                   *node.log, node.clock, node.timers});
  const std::string port = std::to_string(node.server->port());
  EXPECT_EQ(
      second.status(),
      absl::UnavailableError(
          "listen " + node.address() + " cannot be bound: another process has port " +
          port + "; choose another port, or stop that process (ss -ltnp names it)"));
}

struct OptionCase {
  const char* name;
  std::function<void(ServiceOptions&)> change;
  const char* message;
};

class BadOptionSpec : public testing::TestWithParam<OptionCase> {};

TEST_P(BadOptionSpec, IsRefusedWithItsRange) {
  TestNode node;
  ServiceOptions options;
  options.listen = "127.0.0.1:0";
  GetParam().change(options);
  const auto server =
      GrpcServer::Create(options, {node.engines, node.leases, node.ledger, node.metrics,
                                   *node.log, node.clock, node.timers});
  EXPECT_EQ(server.status(), absl::InvalidArgumentError(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BadOptionSpec,
    testing::Values(
        OptionCase{"streams",
                   [](auto& o) { o.transport.concurrent_streams_max = 1025; },
                   "transport.concurrent_streams_max 1025 is outside [1, 1024]"},
        OptionCase{"connections", [](auto& o) { o.transport.connections_max = 0; },
                   "transport.connections_max 0 is outside [1, 1000000]"},
        OptionCase{"metadata", [](auto& o) { o.transport.metadata_bytes_max = 8191; },
                   "transport.metadata_bytes_max 8191 is outside [8192, 1048576]"},
        OptionCase{"quota", [](auto& o) { o.transport.memory_quota_bytes = 1; },
                   "transport.memory_quota_bytes 1 is outside [16777216, "
                   "1099511627776]"},
        OptionCase{"tokens", [](auto& o) { o.limits.tokens_max = 0; },
                   "limits.tokens_max 0 is outside [1, 1048576]"}),
    testing_support::CaseName());

TEST(LogSpec, AMessageIsCutAsTheClientsIs) {
  TestNode node;
  const ServiceParts parts = {node.engines, node.leases, node.ledger, node.metrics,
                              *node.log,    node.clock,  node.timers};
  const CallRecord record(parts, Rpc::kFetch);
  const grpc::Status sent =
      record.End(absl::InvalidArgumentError(std::string(5'000'000, 'x')));
  EXPECT_EQ(sent.error_message(), std::string(kGrpcMessageBytesMax, 'x'));
  node.Stop();
  const std::string text = node.FlushedLog();
  EXPECT_THAT(text, testing::HasSubstr("\"" + sent.error_message() + "\""));
}

TEST(LogSpec, EveryCallLeavesOneLineAndNoPrompt) {
  NodeOptions options;
  TestNode node(options);
  v1::PrefillRequest request = PrefillOf(5);
  request.set_request_id("find-me");
  request.set_token_ids(3, 99999);
  PrefillEvents events;
  EXPECT_FALSE(node.NewClient()->Prefill(request, events).ok());
  node.Stop();
  EXPECT_EQ(node.metrics.rpc.Requests(Rpc::kPrefill, absl::StatusCode::kInvalidArgument)
                .Value(),
            1);
  const std::string text = node.FlushedLog();
  EXPECT_THAT(text, testing::HasSubstr("\"request_id\":\"find-me\""));
  EXPECT_THAT(text, testing::HasSubstr("\"code\":\"INVALID_ARGUMENT\""));
  EXPECT_THAT(text, testing::Not(testing::HasSubstr("99999")));
}

}  // namespace
}  // namespace pbs::server
