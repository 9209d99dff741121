// Spec: docs/OPERATIONS.md, "Outcomes". How a call ends is told alike by its `call`
// event and by the metrics, whoever ended it.
// Length: one table.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>

#include <grpcpp/generic/generic_stub.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "proto/wire/messages.h"
#include "tests/integration/test_node.h"
#include "tests/support/attend_headers.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using absl::StatusCode;
using Series = std::set<std::string>;

const absl::Duration kTime = absl::Minutes(30);  // of a call with a deadline
// When a caller's clock ends a call: the server's deadline may be ten seconds later
// than the caller's, as gRPC rounds it up.
const absl::Duration kAlmost = kTime - absl::Seconds(5);

// ---- calls, and who ends them

enum class End { kNobody, kCaller, kCallersClock, kServersClock, kSlow, kStop };

// Ends a call whose context is `context`, and returns once the server knows.
void EndIt(TestNode& node, grpc::ClientContext& context,
           const std::shared_ptr<grpc::Channel>& channel, End end) {
  if (end == End::kCallersClock) node.Advance(kAlmost);
  if (end == End::kServersClock) node.Advance(2 * kTime);
  if (end == End::kSlow) node.Advance(absl::Minutes(2));
  if (end == End::kStop) {  // as Node::FinishWork() does
    node.server->CutUploads();
    node.engine.executor().Shutdown();
  }
  if (end != End::kCaller && end != End::kCallersClock) return;
  context.TryCancel();
  // Behind the news on the same connection; some more for the thread that has it.
  constexpr int kRoundTrips = 400;
  auto stub = v1::Prefill::NewStub(channel);
  for (int i = 0; i < kRoundTrips; ++i) {
    grpc::ClientContext other;
    v1::ListModelsResponse answer;
    EXPECT_TRUE(stub->ListModels(&other, {}, &answer).ok());
  }
}

void SetDeadline(grpc::ClientContext& context, End end) {
  if (end != End::kCallersClock && end != End::kServersClock) return;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kTime));
}

// A prefill that ends after `steps` layers.
void Prefill(TestNode& node, const v1::PrefillRequest& request, int steps, End end) {
  auto channel = node.NewChannel();
  grpc::ClientContext context;
  SetDeadline(context, end);
  auto reader = v1::Prefill::NewStub(channel)->Prefill(&context, request);
  v1::PrefillEvent event;
  EXPECT_TRUE(reader->Read(&event) && event.has_admitted());
  for (int i = 0; i < steps; ++i) EXPECT_TRUE(node.engine.executor().RunOneStep());
  if (request.delivery().has_inline_()) {
    EXPECT_TRUE(Eventually([&] { return node.metrics.kv.transfer_bytes.Value() > 0; }));
  }
  EndIt(node, context, channel, end);
  EXPECT_TRUE(node.StepUntil([&] { return node.Waiting() + node.Running() == 0; }));
  while (reader->Read(&event)) {
  }
  reader->Finish();
}

v1::PrefillRequest InlineOf(int32_t num_tokens) {
  v1::PrefillRequest request = PrefillOf(num_tokens);
  request.mutable_delivery()->mutable_inline_();
  return request;
}

// One that is refused.
void Refused(TestNode& node, const v1::PrefillRequest& request) {
  PrefillEvents events;
  EXPECT_FALSE(node.NewClient()->Prefill(request, events).ok());
}

enum class Sent { kNothing, kHeader, kPart };

// An upload that ends early: by a half-close or as `end` says.
void Upload(TestNode& node, Sent sent, End end) {
  auto channel = node.NewChannel();
  grpc::ClientContext context;
  SetDeadline(context, end);
  auto stream = v1::Attention::NewStub(channel)->Attend(&context);
  v1::AttendRequest message;
  if (sent != Sent::kNothing) {
    *message.mutable_header() = testing_support::UploadHeader({1, 2, 600, 64});
    EXPECT_TRUE(stream->Write(message));
    EXPECT_TRUE(Eventually([&] { return node.ledger.bytes_held() > 0; }));
  }
  if (sent == Sent::kPart) {
    message.mutable_chunk()->set_tensor(v1::Q);
    message.mutable_chunk()->set_data(std::string(100'000, '\0'));
    EXPECT_TRUE(stream->Write(message));
  }
  if (end == End::kNobody) stream->WritesDone();
  EndIt(node, context, channel, end);
  v1::AttendResponse response;
  EXPECT_FALSE(stream->Read(&response));
  stream->Finish();
}

// The caller's whole connection goes.
void DisconnectInUpload(TestNode& node) {
  auto channel = node.NewChannel();
  auto context = std::make_unique<grpc::ClientContext>();
  auto stream = v1::Attention::NewStub(channel)->Attend(context.get());
  v1::AttendRequest message;
  *message.mutable_header() = testing_support::UploadHeader({1, 2, 600, 64});
  EXPECT_TRUE(stream->Write(message));
  EXPECT_TRUE(Eventually([&] { return node.ledger.bytes_held() > 0; }));
  stream.reset();
  context.reset();
  channel.reset();
}

v1::Done Leased(TestNode& node) {
  PrefillEvents events;
  auto done = node.NewClient()->Prefill(LeaseOf(1000), events);
  EXPECT_TRUE(done.ok()) << done.status();
  return *done;
}

// A fetch that ends when some of it is under way, or that waits for the transport.
void Fetch(TestNode& node, End end) {
  const v1::Done done = Leased(node);
  auto channel = node.NewNarrowChannel();
  grpc::ClientContext context;
  SetDeadline(context, end);
  v1::FetchRequest request;
  *request.mutable_ticket() = done.ticket();
  auto reader = v1::KvSource::NewStub(channel)->Fetch(&context, request);
  EXPECT_TRUE(Eventually([&] { return node.metrics.kv.transfer_bytes.Value() > 0; }));
  if (end == End::kStop) {
    node.server->Shutdown(absl::ZeroDuration());
  } else {
    EndIt(node, context, channel, end);
  }
  v1::KvChunk chunk;
  while (reader->Read(&chunk)) {
  }
  reader->Finish();
}

void FetchNothing(TestNode& node) {
  grpc::ClientContext context;
  v1::FetchRequest request;
  request.mutable_ticket()->set_handle("none");
  auto reader = v1::KvSource::NewStub(node.NewChannel())->Fetch(&context, request);
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

void Unknown(TestNode& node) {
  grpc::GenericStub stub(node.NewChannel());
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  grpc::ByteBuffer reply;
  auto call = stub.PrepareUnaryCall(&context, "/pbs.v1.Prefill/Nothing",
                                    wire::EncodeMessage(PrefillOf(5)), &queue);
  grpc::Status status;
  call->StartCall();
  call->Finish(&reply, &status, nullptr);
  void* tag;
  bool ok;
  EXPECT_TRUE(queue.Next(&tag, &ok));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

// ---- what is told of them

struct Outcome {
  const char* name;
  std::function<void(TestNode&)> act;
  Rpc rpc;
  StatusCode code;
  const char* level;
  const char* message;  // part of the event's
  Series counted;       // besides pbs_requests_total; of the families below
  NodeOptions options = {.executor_thread = false};
};

// Labels of the series of `family` that have counted something.
void AddCounted(const prometheus::MetricFamily& family, const char* prefix,
                Series& counted) {
  for (const prometheus::ClientMetric& metric : family.metric) {
    if (metric.counter.value == 0) continue;
    std::string labels = prefix;
    for (const auto& label : metric.label) labels += " " + label.value;
    counted.insert(labels);
  }
}

Series Counted(TestNode& node, const char* family, const char* prefix) {
  Series counted;
  for (const auto& collected : node.registry.Collect()) {
    if (collected.name == family) AddCounted(collected, prefix, counted);
  }
  return counted;
}

Series WhyNotDone(TestNode& node) {
  Series all = Counted(node, "pbs_requests_rejected_total", "rejected");
  all.merge(Counted(node, "pbs_prefill_tokens_wasted_total", "wasted"));
  all.merge(Counted(node, "pbs_kv_transfer_failures_total", "transfer"));
  return all;
}

// The `call` events of `rpc` in a log.
std::vector<std::string> CallEvents(const std::string& log, const std::string& rpc) {
  std::vector<std::string> events;
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    const bool is_call = line.find("\"event\":\"call\"") != std::string::npos &&
                         line.find("\"rpc\":\"" + rpc + "\"") != std::string::npos;
    if (is_call) events.push_back(line);
  }
  return events;
}

class OutcomeSpec : public testing::TestWithParam<Outcome> {};

TEST_P(OutcomeSpec, IsToldByTheLogAndTheMetricsAlike) {
  const Outcome& outcome = GetParam();
  TestNode node(outcome.options);
  outcome.act(node);
  const std::string rpc = kRpcNames[static_cast<size_t>(outcome.rpc)];
  const auto& requests = node.metrics.rpc;
  EXPECT_TRUE(Eventually([&] {
    return requests.Requests(outcome.rpc, outcome.code).Value() > 0;
  })) << "no such call was counted";
  for (size_t code = 0; code < kCodeNames.size(); ++code) {
    const auto other = static_cast<StatusCode>(code);
    EXPECT_EQ(requests.Requests(outcome.rpc, other).Value(),
              other == outcome.code ? 1 : 0)
        << kCodeNames[code];
  }
  EXPECT_EQ(WhyNotDone(node), outcome.counted);
  node.Stop();
  const std::vector<std::string> events = CallEvents(node.FlushedLog(), rpc);
  ASSERT_EQ(events.size(), 1u);
  const std::string code = absl::StatusCodeToString(outcome.code);
  EXPECT_THAT(events[0], testing::HasSubstr("\"code\":\"" + code + "\""));
  EXPECT_THAT(events[0], testing::HasSubstr(outcome.message));
  EXPECT_THAT(events[0],
              testing::HasSubstr(std::string("\"level\":\"") + outcome.level + "\""));
}

NodeOptions Serving() { return {}; }
NodeOptions FullQueue() { return {.queue_requests_max = 0, .executor_thread = false}; }
NodeOptions SmallBudget() { return {.memory_bytes_max = 1 << 20}; }
NodeOptions PatientUploads() {
  NodeOptions options = {.executor_thread = false};
  options.service.limits.upload_seconds_max = 3600;
  return options;
}
NodeOptions Loading() { return {.ready = false}; }

constexpr char kPassed[] = "the deadline passed";
constexpr char kWentAway[] = "the caller went away";
constexpr char kShuttingDown[] = "the server is shutting down";

std::vector<Outcome> Prefills() {
  return {
      {"done",
       [](auto& n) { Prefill(n, PrefillOf(200), 0, End::kNobody); },
       Rpc::kPrefill,
       StatusCode::kOk,
       "info",
       "\"message\":\"\"",
       {}},
      {"cancelled_in_the_queue",
       [](auto& n) { Prefill(n, PrefillOf(200), 0, End::kCaller); },
       Rpc::kPrefill,
       StatusCode::kCancelled,
       "info",
       kWentAway,
       {}},
      {"cancelled_between_layers",
       [](auto& n) { Prefill(n, PrefillOf(200), 1, End::kCaller); },
       Rpc::kPrefill,
       StatusCode::kCancelled,
       "info",
       kWentAway,
       {"wasted cancelled"}},
      {"servers_clock_in_the_queue",
       [](auto& n) { Prefill(n, PrefillOf(200), 0, End::kServersClock); },
       Rpc::kPrefill,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {"rejected deadline"}},
      {"callers_clock_in_the_queue",
       [](auto& n) { Prefill(n, PrefillOf(200), 0, End::kCallersClock); },
       Rpc::kPrefill,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {"rejected deadline"}},
      {"servers_clock_between_layers",
       [](auto& n) { Prefill(n, LeaseOf(200), 1, End::kServersClock); },
       Rpc::kPrefill,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {"wasted deadline"}},
      {"callers_clock_between_layers",
       [](auto& n) { Prefill(n, LeaseOf(200), 1, End::kCallersClock); },
       Rpc::kPrefill,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {"wasted deadline"}},
      {"shutdown_in_the_queue",
       [](auto& n) { Prefill(n, PrefillOf(200), 0, End::kStop); },
       Rpc::kPrefill,
       StatusCode::kUnavailable,
       "warning",
       kShuttingDown,
       {}},
      {"shutdown_between_layers",
       [](auto& n) { Prefill(n, PrefillOf(200), 1, End::kStop); },
       Rpc::kPrefill,
       StatusCode::kUnavailable,
       "warning",
       kShuttingDown,
       {"wasted shutdown"}},
  };
}

std::vector<Outcome> InlinePrefills() {
  return {
      {"callers_clock_in_an_inline_cache",
       [](auto& n) { Prefill(n, InlineOf(200), 1, End::kCallersClock); },
       Rpc::kPrefill,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {"wasted deadline", "transfer deadline"}},
      {"shutdown_in_an_inline_cache",
       [](auto& n) { Prefill(n, InlineOf(200), 1, End::kStop); },
       Rpc::kPrefill,
       StatusCode::kUnavailable,
       "warning",
       kShuttingDown,
       {"wasted shutdown", "transfer shutdown"}},
  };
}

std::vector<Outcome> Refusals() {
  return {
      {"queue_full",
       [](auto& n) { Refused(n, PrefillOf(5)); },
       Rpc::kPrefill,
       StatusCode::kResourceExhausted,
       "warning",
       "queue_requests_max is 0",
       {"rejected queue_full"},
       FullQueue()},
      {"never_fits",
       [](auto& n) { Refused(n, PrefillOf(4000)); },
       Rpc::kPrefill,
       StatusCode::kInvalidArgument,
       "info",
       "memory_bytes_max",
       {"rejected too_large"},
       SmallBudget()},
      {"loading",
       [](auto& n) { Refused(n, PrefillOf(5)); },
       Rpc::kPrefill,
       StatusCode::kUnavailable,
       "warning",
       "loading models",
       {"rejected loading"},
       Loading()},
      {"draining",
       [](auto& n) {
         n.server->Drain();
         Refused(n, PrefillOf(5));
       },
       Rpc::kPrefill,
       StatusCode::kUnavailable,
       "warning",
       "draining",
       {"rejected draining"},
       Serving()},
      {"unknown_method",
       Unknown,
       Rpc::kUnknown,
       StatusCode::kUnimplemented,
       "info",
       "no method \\\"/pbs.v1.Prefill/Nothing",
       {},
       Serving()},
      {"a_bad_request",
       [](auto& n) { Refused(n, PrefillOf(0)); },
       Rpc::kPrefill,
       StatusCode::kInvalidArgument,
       "info",
       "number of token_ids",
       {},
       Serving()},
  };
}

std::vector<Outcome> Uploads() {
  return {
      {"upload_without_a_header",
       [](auto& n) { Upload(n, Sent::kNothing, End::kNobody); },
       Rpc::kAttend,
       StatusCode::kInvalidArgument,
       "info",
       "ended before its header",
       {}},
      {"upload_that_ends_early",
       [](auto& n) { Upload(n, Sent::kPart, End::kNobody); },
       Rpc::kAttend,
       StatusCode::kInvalidArgument,
       "info",
       "the upload ended at offset",
       {}},
      {"left_before_the_header",
       [](auto& n) { Upload(n, Sent::kNothing, End::kCaller); },
       Rpc::kAttend,
       StatusCode::kCancelled,
       "info",
       kWentAway,
       {}},
      {"left_in_the_upload",
       [](auto& n) { Upload(n, Sent::kPart, End::kCaller); },
       Rpc::kAttend,
       StatusCode::kCancelled,
       "info",
       kWentAway,
       {}},
      {"disconnected_in_the_upload",
       DisconnectInUpload,
       Rpc::kAttend,
       StatusCode::kCancelled,
       "info",
       kWentAway,
       {}},
      {"callers_clock_in_the_upload",
       [](auto& n) { Upload(n, Sent::kHeader, End::kCallersClock); },
       Rpc::kAttend,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {},
       PatientUploads()},
      {"slow_upload",
       [](auto& n) { Upload(n, Sent::kHeader, End::kSlow); },
       Rpc::kAttend,
       StatusCode::kDeadlineExceeded,
       "info",
       "upload_seconds_max 120",
       {}},
  };
}

std::vector<Outcome> Fetches() {
  return {
      {"unknown_ticket",
       FetchNothing,
       Rpc::kFetch,
       StatusCode::kNotFound,
       "info",
       "ticket",
       {},
       Serving()},
      {"reader_left",
       [](auto& n) { Fetch(n, End::kCaller); },
       Rpc::kFetch,
       StatusCode::kCancelled,
       "info",
       kWentAway,
       {"transfer cancelled"},
       Serving()},
      {"readers_clock",
       [](auto& n) { Fetch(n, End::kCallersClock); },
       Rpc::kFetch,
       StatusCode::kDeadlineExceeded,
       "info",
       kPassed,
       {"transfer deadline"},
       Serving()},
      {"stopped_server",
       [](auto& n) { Fetch(n, End::kStop); },
       Rpc::kFetch,
       StatusCode::kUnavailable,
       "warning",
       kShuttingDown,
       {"transfer shutdown"},
       Serving()},
  };
}

INSTANTIATE_TEST_SUITE_P(Prefill, OutcomeSpec, testing::ValuesIn(Prefills()),
                         testing_support::CaseName());
INSTANTIATE_TEST_SUITE_P(InlinePrefill, OutcomeSpec,
                         testing::ValuesIn(InlinePrefills()),
                         testing_support::CaseName());
INSTANTIATE_TEST_SUITE_P(Refusal, OutcomeSpec, testing::ValuesIn(Refusals()),
                         testing_support::CaseName());
INSTANTIATE_TEST_SUITE_P(Upload, OutcomeSpec, testing::ValuesIn(Uploads()),
                         testing_support::CaseName());
INSTANTIATE_TEST_SUITE_P(Fetch, OutcomeSpec, testing::ValuesIn(Fetches()),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
