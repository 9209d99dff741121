// Spec: server/service/attend_call.h and uploads.h over real gRPC: what an Attend waits
// for between its half-close and the engine's queue, and what a drain does to it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <utility>

#include "pbs/v1/attention.grpc.pb.h"
#include "server/service/service_context.h"
#include "server/service/services.h"
#include "tests/integration/test_node.h"
#include "tests/support/attend_headers.h"

namespace pbs::server {
namespace {

using Stream = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;

constexpr int64_t kTensorBytes = 1 * 2 * 40 * 32 * sizeof(float);

v1::AttendRequest UploadedHeader() {
  v1::AttendRequest request;
  *request.mutable_header() = testing_support::UploadHeader({1, 2, 40, 32});
  return request;
}
v1::AttendRequest SyntheticHeader() {
  v1::AttendRequest request;
  *request.mutable_header() = testing_support::SyntheticHeader(2, 1, 600, 32);
  return request;
}
v1::AttendRequest TensorOf(v1::TensorName tensor) {
  v1::AttendRequest request;
  request.mutable_chunk()->set_tensor(tensor);
  request.mutable_chunk()->set_data(std::string(kTensorBytes, '\0'));
  return request;
}

// One call of a test.
struct Call {
  explicit Call(const std::shared_ptr<grpc::Channel>& channel)
      : stub(v1::Attention::NewStub(channel)), stream(stub->Attend(&context)) {}

  void SendSynthetic() {
    EXPECT_TRUE(stream->Write(SyntheticHeader()));
    EXPECT_TRUE(stream->WritesDone());
  }
  void SendTensors() {
    for (v1::TensorName tensor : {v1::Q, v1::K, v1::V}) {
      EXPECT_TRUE(stream->Write(TensorOf(tensor)));
    }
    EXPECT_TRUE(stream->WritesDone());
  }
  grpc::Status Finish() {
    v1::AttendResponse response;
    while (stream->Read(&response)) {
    }
    return stream->Finish();
  }

  grpc::ClientContext context;
  const std::unique_ptr<v1::Attention::Stub> stub;
  const std::unique_ptr<Stream> stream;
};

// Attention on a node of its own, with the service's insides in the test's hands.
class UploadNodeSpec : public testing::Test {
 protected:
  static constexpr int32_t kUploadsMax = 2;

  UploadNodeSpec() {
    context_.SetModels({});
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&attention_);
    server_ = builder.BuildAndStart();
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(port_),
                                   grpc::InsecureChannelCredentials());
  }
  ~UploadNodeSpec() override {
    ReleaseBackground();
    server_->Shutdown(std::chrono::system_clock::now());
  }

  // The background thread does nothing else until it is released.
  void HoldBackground() {
    context_.background.Post([held = release_.get_future().share()] { held.wait(); });
    is_held_ = true;
  }
  void ReleaseBackground() {
    if (std::exchange(is_held_, false)) release_.set_value();
  }
  int64_t HeldBytes() const { return node_.ledger.bytes_held(); }
  double Rejected(RejectReason reason) const {
    return node_.metrics.engine.Rejected(reason).Value();
  }
  // The status of a call whose job the engine has.
  grpc::Status StepToTheEnd(Call& call) {
    auto status = std::async(std::launch::async, [&] { return call.Finish(); });
    EXPECT_TRUE(node_.StepUntil([&] {
      return status.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    }));
    return status.get();
  }

  TestNode node_{{.executor_thread = false}};
  ServiceOptions Options() const {
    ServiceOptions options = PatientService();
    options.limits.upload_requests_max = kUploadsMax;
    return options;
  }
  ServiceContext context_{Options(),
                          {node_.engines, node_.leases, node_.ledger, node_.metrics,
                           *node_.log, node_.clock, node_.timers}};
  AttentionService attention_{context_};
  std::promise<void> release_;
  bool is_held_ = false;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

// ---- the background thread

TEST_F(UploadNodeSpec, UploadedTensorsDoNotWaitBehindAGenerator) {
  HoldBackground();
  Call call(channel_);
  ASSERT_TRUE(call.stream->Write(UploadedHeader()));
  call.SendTensors();
  EXPECT_TRUE(Eventually([&] { return node_.Waiting() == 1; }));
  const grpc::Status status = StepToTheEnd(call);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(UploadNodeSpec, ACancelledCallThatWaitsForItsGeneratorFreesItsMemoryAtOnce) {
  HoldBackground();
  Call call(channel_);
  call.SendSynthetic();
  ASSERT_TRUE(Eventually([&] { return HeldBytes() > 0; }));
  call.context.TryCancel();
  EXPECT_TRUE(Eventually([&] { return HeldBytes() == 0; }));
  EXPECT_EQ(call.Finish().error_code(), grpc::StatusCode::CANCELLED);
  ReleaseBackground();
  EXPECT_TRUE(Eventually([&] { return context_.uploads.size() == 0; }));
  EXPECT_EQ(node_.Waiting(), 0);
}

TEST_F(UploadNodeSpec, ACallThatWaitsForItsGeneratorKeepsItsPlace) {
  HoldBackground();
  Call first(channel_), second(channel_);
  first.SendSynthetic();
  second.SendSynthetic();
  ASSERT_TRUE(Eventually([&] { return context_.uploads.size() == 2; }));
  EXPECT_EQ(Call(channel_).Finish().error_message(),
            "uploads under way reach upload_requests_max 2");
  ReleaseBackground();
  EXPECT_TRUE(Eventually([&] { return node_.Waiting() == 2; }));
  EXPECT_TRUE(Eventually([&] { return context_.uploads.size() == 0; }));
  EXPECT_TRUE(StepToTheEnd(first).ok());
  EXPECT_TRUE(StepToTheEnd(second).ok());
}

// ---- drain

TEST_F(UploadNodeSpec, ADrainLetsAnUploadWithItsHeaderFinishAndRun) {
  Call call(channel_);
  ASSERT_TRUE(call.stream->Write(UploadedHeader()));
  ASSERT_TRUE(Eventually([&] { return HeldBytes() > 0; }));
  std::atomic<bool> uploaded = false;
  context_.Drain([&] { uploaded = true; });
  EXPECT_FALSE(uploaded);
  call.SendTensors();
  EXPECT_TRUE(Eventually([&] { return uploaded.load(); }));
  std::atomic<bool> idle = false;
  node_.engine.Drain([&] { idle = true; });
  EXPECT_FALSE(idle);
  const grpc::Status status = StepToTheEnd(call);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(Eventually([&] { return idle.load(); }));
  EXPECT_EQ(Rejected(RejectReason::kDraining), 0);
}

TEST_F(UploadNodeSpec, ADrainWaitsForAGeneratorThatWasAskedFor) {
  HoldBackground();
  Call call(channel_);
  call.SendSynthetic();
  ASSERT_TRUE(Eventually([&] { return HeldBytes() > 0; }));
  std::atomic<bool> uploaded = false;
  context_.Drain([&] { uploaded = true; });
  EXPECT_FALSE(uploaded);
  ReleaseBackground();
  EXPECT_TRUE(Eventually([&] { return uploaded.load(); }));
  EXPECT_TRUE(StepToTheEnd(call).ok());
}

TEST_F(UploadNodeSpec, ADrainSendsAnUploadWithoutAHeaderHome) {
  Call call(channel_);
  ASSERT_TRUE(Eventually([&] { return context_.uploads.size() == 1; }));
  bool uploaded = false;
  context_.Drain([&] { uploaded = true; });
  EXPECT_TRUE(uploaded);
  const grpc::Status status = call.Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "draining: this server takes no new work");
  EXPECT_EQ(Rejected(RejectReason::kDraining), 1);
}

TEST_F(UploadNodeSpec, AnUploadThatDoesNotEndIsCut) {
  Call call(channel_);
  ASSERT_TRUE(call.stream->Write(UploadedHeader()));
  ASSERT_TRUE(Eventually([&] { return HeldBytes() > 0; }));
  std::atomic<bool> uploaded = false;
  context_.Drain([&] { uploaded = true; });
  const absl::Status reason = absl::UnavailableError("the server is shutting down");
  EXPECT_EQ(context_.uploads.Cut(reason), 1);
  const grpc::Status status = call.Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), reason.message());
  EXPECT_TRUE(node_.NothingHeld());
  EXPECT_TRUE(Eventually([&] { return uploaded.load(); }));
}

}  // namespace
}  // namespace pbs::server
