// Spec: "Cancelling an RPC stops work at the next layer and frees everything";
// deadlines likewise; at every stage of every call.
#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>

#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "proto/wire/messages.h"
#include "tests/integration/test_node.h"
#include "tests/support/attend_headers.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

enum class End { kCancel, kDisconnect, kDeadline };

struct StageCase {
  const char* name;
  int steps;  // of the executor before the end; -1: while another job runs before it
  End end;
  bool lease;
};

class PrefillStageSpec : public testing::TestWithParam<StageCase> {
 protected:
  TestNode node_{{.executor_thread = false}};
};

TEST_P(PrefillStageSpec, EndsAtTheNextLayerAndFreesEverything) {
  const auto& [name, steps, end, lease] = GetParam();
  auto channel = node_.NewChannel();
  grpc::ClientContext context;
  // The server counts the deadline by its own clock, which the test moves.
  if (end == End::kDeadline) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(30)));
  }
  auto reader = v1::Prefill::NewStub(channel)->Prefill(
      &context, lease ? LeaseOf(200) : PrefillOf(200));
  v1::PrefillEvent event;
  ASSERT_TRUE(reader->Read(&event));
  ASSERT_TRUE(event.has_admitted());
  for (int i = 0; i < steps; ++i) {
    ASSERT_TRUE(node_.engine.executor().RunOneStep());
    ASSERT_TRUE(reader->Read(&event));
    ASSERT_TRUE(event.has_layer());
  }
  EXPECT_GT(node_.ledger.bytes_held(), 0);

  if (end == End::kCancel) context.TryCancel();
  if (end == End::kDisconnect) {
    context.TryCancel();
    channel.reset();
  }
  if (end == End::kDeadline) node_.Advance(absl::Minutes(50));
  EXPECT_TRUE(node_.StepUntil([&] { return node_.Waiting() + node_.Running() == 0; }));
  // The last step may have been quicker than the cancellation: then there is, a moment
  // later, a lease.
  EXPECT_TRUE(Eventually([&] {
    if (node_.leases.size() > 0) node_.Advance(absl::Seconds(1));
    return node_.ledger.bytes_held() == 0;
  }));
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), end == End::kDeadline
                                               ? grpc::StatusCode::DEADLINE_EXCEEDED
                                               : grpc::StatusCode::CANCELLED);
  EXPECT_EQ(node_.leases.size(), 0);

  // Healthy: the next request runs.
  auto next = std::async(std::launch::async, [&] {
    PrefillEvents events;
    return node_.NewClient()->Prefill(PrefillOf(50), events).status();
  });
  EXPECT_TRUE(node_.StepUntil([&] {
    return next.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }));
  EXPECT_TRUE(next.get().ok());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PrefillStageSpec,
    testing::Values(StageCase{"cancel_in_the_queue", 0, End::kCancel, false},
                    StageCase{"cancel_after_the_first_layer", 1, End::kCancel, false},
                    StageCase{"cancel_after_the_second_layer", 2, End::kCancel, true},
                    StageCase{"cancel_a_lease_in_the_queue", 0, End::kCancel, true},
                    StageCase{"disconnect_in_the_queue", 0, End::kDisconnect, true},
                    StageCase{"disconnect_between_layers", 1, End::kDisconnect, true},
                    StageCase{"deadline_in_the_queue", 0, End::kDeadline, false},
                    StageCase{"deadline_between_layers", 1, End::kDeadline, true}),
    testing_support::CaseName());

TEST(PrefillDeadlineSpec, APassedDeadlineIsRefusedAtOnce) {
  TestNode node({.executor_thread = false});
  node.clock.Advance(absl::ZeroDuration());
  PrefillEvents events;
  const auto done = node.NewClient()->Prefill(
      PrefillOf(50), events, nullptr, {.deadline = absl::Now() - absl::Seconds(1)});
  EXPECT_TRUE(absl::IsDeadlineExceeded(done.status())) << done.status();
  EXPECT_TRUE(node.NothingHeld());
}

TEST(PrefillInlineSpec, AConsumerThatLeavesMidStreamFreesTheCache) {
  TestNode node;
  grpc::ClientContext context;
  v1::PrefillRequest request = PrefillOf(1000);
  request.mutable_delivery()->mutable_inline_()->set_chunk_bytes(64 << 10);
  auto reader =
      v1::Prefill::NewStub(node.NewNarrowChannel())->Prefill(&context, request);
  v1::PrefillEvent event;
  while (reader->Read(&event) && !event.has_kv()) {
  }
  ASSERT_TRUE(event.has_kv());
  context.TryCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(node.NothingHeld());
  EXPECT_TRUE(Eventually([&] {
    return node.metrics.kv.TransferFailed(TransferFailure::kCancelled).Value() == 1;
  }));
}

// ---- uploads

// An Attend that has sent its header and some chunks.
class UploadSpec : public testing::Test {
 protected:
  UploadSpec() {
    auto stub = v1::Attention::NewStub(channel_);
    stream_ = stub->Attend(&context_);
    v1::AttendRequest message;
    *message.mutable_header() = testing_support::UploadHeader({1, 2, 600, 64});
    EXPECT_TRUE(stream_->Write(message));
    message.mutable_chunk()->set_tensor(v1::Q);
    message.mutable_chunk()->set_data(std::string(100'000, '\0'));
    EXPECT_TRUE(stream_->Write(message));
    EXPECT_TRUE(Eventually([&] { return node_.ledger.bytes_held() > 0; }));
  }

  grpc::StatusCode Finish() {
    v1::AttendResponse response;
    while (stream_->Read(&response)) {
    }
    return stream_->Finish().error_code();
  }

  TestNode node_{{.executor_thread = false}};
  std::shared_ptr<grpc::Channel> channel_ = node_.NewChannel();
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>>
      stream_;
};

TEST_F(UploadSpec, CancelledFreesEverything) {
  context_.TryCancel();
  EXPECT_EQ(Finish(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(UploadSpec, TooSlowIsCutWithTheLimit) {
  node_.Advance(absl::Seconds(119));
  EXPECT_GT(node_.ledger.bytes_held(), 0);
  node_.Advance(absl::Seconds(1));
  v1::AttendResponse response;
  EXPECT_FALSE(stream_->Read(&response));
  const grpc::Status status = stream_->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(status.error_message(),
            "the upload took longer than upload_seconds_max 120");
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(UploadSpec, AnUploadThatEndsEarlyIsRefused) {
  stream_->WritesDone();
  v1::AttendResponse response;
  EXPECT_FALSE(stream_->Read(&response));
  const grpc::Status status = stream_->Finish();
  EXPECT_EQ(status.error_message(),
            "tensor Q: the upload ended at offset 100000 of 307200 bytes");
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(UploadSpec, ServerShutdownEndsIt) {
  node_.Stop();
  EXPECT_NE(Finish(), grpc::StatusCode::OK);
  EXPECT_EQ(node_.ledger.bytes_held(), 0);
}

class AttendStageSpec : public testing::TestWithParam<StageCase> {};

TEST_P(AttendStageSpec, EndsBetweenRunsAndFreesEverything) {
  TestNode node({.executor_thread = false});
  const auto& [name, steps, end, lease] = GetParam();
  grpc::ClientContext context;
  if (end == End::kDeadline) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Minutes(30)));
  }
  auto stream = v1::Attention::NewStub(node.NewChannel())->Attend(&context);
  v1::AttendRequest message;
  *message.mutable_header() = testing_support::SyntheticHeader(2, 1, 600, 32);
  message.mutable_header()->set_repetitions(5);
  ASSERT_TRUE(stream->Write(message));
  stream->WritesDone();
  ASSERT_TRUE(Eventually([&] { return node.Waiting() == 1; }));
  for (int i = 0; i < steps; ++i) ASSERT_TRUE(node.engine.executor().RunOneStep());
  EXPECT_GT(node.ledger.bytes_held(), 0);
  if (end == End::kCancel) context.TryCancel();
  if (end == End::kDeadline) node.Advance(absl::Minutes(50));
  EXPECT_TRUE(node.StepUntil([&] { return node.ledger.bytes_held() == 0; }));
  v1::AttendResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), end == End::kDeadline
                                               ? grpc::StatusCode::DEADLINE_EXCEEDED
                                               : grpc::StatusCode::CANCELLED);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, AttendStageSpec,
    testing::Values(StageCase{"cancel_in_the_queue", 0, End::kCancel, false},
                    StageCase{"cancel_between_runs", 2, End::kCancel, false},
                    StageCase{"deadline_in_the_queue", 0, End::kDeadline, false},
                    StageCase{"deadline_between_runs", 3, End::kDeadline, false}),
    testing_support::CaseName());

TEST(AttendReplySpec, AReaderThatLeavesMidReplyFreesTheResult) {
  TestNode node;
  grpc::ClientContext context;
  auto stream = v1::Attention::NewStub(node.NewNarrowChannel())->Attend(&context);
  v1::AttendRequest message;
  *message.mutable_header() = testing_support::SyntheticHeader(4, 1, 1000, 128);
  message.mutable_header()->mutable_synthetic()->set_white_noise(true);
  message.mutable_header()->mutable_options()->mutable_pbs()->set_threshold(0.1f);
  ASSERT_TRUE(stream->Write(message));
  stream->WritesDone();
  v1::AttendResponse response;
  while (stream->Read(&response) && !response.has_chunk()) {
  }
  ASSERT_TRUE(response.has_chunk());
  context.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(node.NothingHeld());
}

}  // namespace
}  // namespace pbs::server
