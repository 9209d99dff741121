// Spec: server/base/grpc_status.h.
#include "server/base/grpc_status.h"

#include <gtest/gtest.h>

#include <string>

#include "google/rpc/error_details.pb.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

TEST(GrpcStatus, KeepsCodeAndMessage) {
  const grpc::Status status =
      ToGrpc(absl::InvalidArgumentError("top_logits 101 > 100"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(status.error_message(), "top_logits 101 > 100");
  EXPECT_EQ(status.error_details(), "");
}

TEST(GrpcStatus, OkIsOk) { EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok()); }

TEST(GrpcStatus, ResourceExhaustedSaysWhenToTryAgain) {
  const grpc::Status status = ToGrpc(absl::ResourceExhaustedError("queue is full"));
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), static_cast<int>(grpc::StatusCode::RESOURCE_EXHAUSTED));
  EXPECT_EQ(details.message(), "queue is full");
  ASSERT_EQ(details.details_size(), 1);
  EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.RetryInfo");
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  EXPECT_EQ(retry.retry_delay().nanos(), 0);
}

TEST(GrpcStatus, GivenRetryAdviceIsSentAsItIs) {
  const grpc::Status status = ToGrpc(
      WithRetryAfter(absl::UnavailableError("loading"), absl::Milliseconds(2500)));
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
}

TEST(GrpcStatus, LongMessagesAreCutAtACharacter) {
  std::string text(kGrpcMessageBytesMax - 1, 'x');
  text += "\xC3\xA9 and more";  // a two-byte character across the limit
  const grpc::Status status = ToGrpc(absl::InternalError(text));
  EXPECT_EQ(status.error_message(), std::string(kGrpcMessageBytesMax - 1, 'x'));
}

TEST(GrpcStatus, AMessageAtTheLimitIsWhole) {
  const std::string text(kGrpcMessageBytesMax, 'x');
  EXPECT_EQ(ToGrpc(absl::InternalError(text)).error_message(), text);
}

}  // namespace
}  // namespace pbs::server
