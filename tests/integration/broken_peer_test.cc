// Spec: whatever becomes of a client - killed, cut off, silent - nothing of it stays
// and nobody else notices.
#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "tests/integration/test_node.h"
#include "tests/support/attend_headers.h"
#include "tests/support/case_name.h"
#include "tests/support/child_process.h"
#include "tests/support/cutting_proxy.h"

namespace pbs::server {
namespace {

using testing_support::ChildProcess;
using testing_support::CuttingProxy;

v1::KvTicket HoldLease(TestNode& node, int32_t num_tokens) {
  PrefillEvents events;
  const auto done = node.NewClient()->Prefill(LeaseOf(num_tokens), events);
  EXPECT_TRUE(done.ok()) << done.status();
  // Its workspace is free a moment after its reply.
  EXPECT_TRUE(Eventually([&] { return node.Running() == 0; }));
  return done->ticket();
}
v1::FetchRequest FetchOf(const v1::KvTicket& ticket) {
  v1::FetchRequest request;
  *request.mutable_ticket() = ticket;
  return request;
}

void ExpectServes(TestNode& node) {
  PrefillEvents events;
  const auto done = node.NewClient()->Prefill(PrefillOf(50), events);
  EXPECT_TRUE(done.ok()) << done.status();
}

// ---- clients that are killed

struct KilledCase {
  const char* name;
  const char* what;      // of hanging_client
  bool executor_thread;  // without it the prefill stays in the queue
};

class KilledClientSpec : public testing::TestWithParam<KilledCase> {};

TEST_P(KilledClientSpec, LeavesNoByteHeld) {
  NodeOptions options;
  options.executor_thread = GetParam().executor_thread;
  TestNode node(options);
  ChildProcess client({PBS_HANGING_CLIENT, node.address(), GetParam().what});
  ASSERT_TRUE(Eventually([&] { return node.ledger.bytes_held() > 0; }));
  client.Kill();
  EXPECT_TRUE(node.NothingHeld()) << node.ledger.bytes_held();
  EXPECT_TRUE(Eventually([&] { return node.Waiting() + node.Running() == 0; }));
  if (options.executor_thread) ExpectServes(node);
}

INSTANTIATE_TEST_SUITE_P(Stages, KilledClientSpec,
                         testing::Values(KilledCase{"mid_upload", "upload", true},
                                         KilledCase{"in_the_queue", "prefill", false},
                                         KilledCase{"while_it_runs", "prefill", true},
                                         KilledCase{"mid_inline_cache", "inline",
                                                    true}),
                         testing_support::CaseName());

TEST(KilledFetcherSpec, LeavesTheLeaseToOthers) {
  TestNode node;
  const v1::KvTicket ticket = HoldLease(node, 1000);
  const int64_t held = node.ledger.bytes_held();
  ChildProcess client({PBS_HANGING_CLIENT, node.address(), "fetch", ticket.handle(),
                       std::to_string(ticket.epoch())});
  ASSERT_TRUE(Eventually([&] { return node.metrics.kv.transfer_bytes.Value() > 0; }));
  client.Kill();
  EXPECT_TRUE(Eventually([&] {
    return node.metrics.kv.TransferFailed(TransferFailure::kCancelled).Value() == 1;
  }));
  EXPECT_EQ(node.ledger.bytes_held(), held);
  KvArrays arrays;
  EXPECT_TRUE(node.NewClient()->Fetch(FetchOf(ticket), arrays).ok());
  EXPECT_TRUE(node.NewClient()->Release(ticket).ok());
  EXPECT_TRUE(node.NothingHeld());
}

// ---- connections that break

struct CutCase {
  const char* name;
  std::vector<int64_t> cuts;  // bytes of each broken connection
  v1::DType dtype = v1::F32;
  v1::KvLayout layout = v1::HND;
};

class CutConnectionSpec : public testing::TestWithParam<CutCase> {};

// 2000 tokens: 1,024,000 bytes per layer, in two arrays.
TEST_P(CutConnectionSpec, AFetchGoesOnWhereItBroke) {
  TestNode node;
  const v1::KvTicket ticket = HoldLease(node, 2000);
  v1::FetchRequest request = FetchOf(ticket);
  request.set_dtype(GetParam().dtype);
  request.set_layout(GetParam().layout);
  request.set_page_tokens(16);
  request.set_chunk_bytes(64 << 10);
  KvArrays whole;
  ASSERT_TRUE(node.NewClient()->Fetch(request, whole).ok());

  CuttingProxy proxy(node.server->port(), GetParam().cuts);
  auto client = client::Client::Connect({.address = proxy.address()});
  ASSERT_TRUE(client.ok()) << client.status();
  KvArrays pieces;
  const absl::Status status = (*client)->Fetch(request, pieces);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(proxy.connections(), static_cast<int>(GetParam().cuts.size()) + 1);
  EXPECT_EQ(pieces.layers, whole.layers);  // each once, in order
  EXPECT_EQ(pieces.arrays, whole.arrays);
  client->reset();
  EXPECT_TRUE(node.NewClient()->Release(ticket).ok());
  EXPECT_TRUE(node.NothingHeld());
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CutConnectionSpec,
    testing::Values(CutCase{"in_the_first_layer", {250'000}},
                    CutCase{"in_the_last_layer", {2'500'000}},
                    CutCase{"once_in_every_layer", {500'000, 1'500'000, 750'000}},
                    CutCase{"nhd", {300'000}, v1::F32, v1::NHD},
                    CutCase{"f8_e4m3", {300'000, 100'000}, v1::F8_E4M3},
                    CutCase{"f8_e4m3_nhd", {400'000}, v1::F8_E4M3, v1::NHD}),
    testing_support::CaseName());

// ---- clients that read nothing

// Fetches that are open and unread, some of caches as they are held, some laid out
// anew.
class UnreadFetches {
 public:
  UnreadFetches(TestNode& node, const v1::KvTicket& ticket, int count) {
    constexpr int kStreamsPerConnection = 50;
    for (int i = 0; i < count; ++i) {
      if (i % kStreamsPerConnection == 0)
        stub_ = v1::KvSource::NewStub(node.NewNarrowChannel());
      v1::FetchRequest request = FetchOf(ticket);
      if (i % 2 == 1) request.set_layout(v1::NHD);
      contexts_.push_back(std::make_unique<grpc::ClientContext>());
      readers_.push_back(stub_->Fetch(contexts_.back().get(), request));
      readers_.back()->WaitForInitialMetadata();
    }
  }

  // The status of every fetch once it was cancelled.
  std::vector<grpc::StatusCode> Cancel() {
    std::vector<grpc::StatusCode> codes;
    for (size_t i = 0; i < readers_.size(); ++i) {
      contexts_[i]->TryCancel();
      v1::KvChunk chunk;
      while (readers_[i]->Read(&chunk)) {
      }
      codes.push_back(readers_[i]->Finish().error_code());
    }
    return codes;
  }

 private:
  std::unique_ptr<v1::KvSource::Stub> stub_;
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts_;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::KvChunk>>> readers_;
};

TEST(UnreadStreamsSpec, TwoHundredBlockNobodyAndGoWithoutATrace) {
  NodeOptions options;
  options.service.transport.chunk_bytes = kChunkBytesMin;
  TestNode node(options);
  const v1::KvTicket ticket = HoldLease(node, 1000);
  const int64_t lease_bytes = node.ledger.bytes_held();
  {
    UnreadFetches fetches(node, ticket, 200);
    // Two chunks for each that lays its cache out anew.
    EXPECT_EQ(node.ledger.bytes_held(), lease_bytes + 100 * 2 * kChunkBytesMin);
    ExpectServes(node);
    KvArrays arrays;
    EXPECT_TRUE(node.NewClient()->Fetch(FetchOf(ticket), arrays).ok());
    for (grpc::StatusCode code : fetches.Cancel()) {
      EXPECT_EQ(code, grpc::StatusCode::CANCELLED);
    }
  }
  EXPECT_TRUE(Eventually([&] { return node.ledger.bytes_held() == lease_bytes; }))
      << node.ledger.bytes_held() << " and not " << lease_bytes;
  EXPECT_TRUE(node.NewClient()->Release(ticket).ok());
  EXPECT_TRUE(node.NothingHeld());
}

// ---- deadlines of the caller, by the real clock

TEST(CallerDeadlineSpec, EndsAnUploadAFetchAndADownload) {
  TestNode node;
  const v1::KvTicket ticket = HoldLease(node, 1000);
  const int64_t lease_bytes = node.ledger.bytes_held();
  const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(2);
  grpc::ClientContext upload_context, fetch_context, download_context;
  for (auto* context : {&upload_context, &fetch_context, &download_context}) {
    context->set_deadline(deadline);
  }
  auto channel = node.NewNarrowChannel();
  auto attention = v1::Attention::NewStub(channel);
  auto upload = attention->Attend(&upload_context);
  v1::AttendRequest message;
  *message.mutable_header() = testing_support::UploadHeader({1, 2, 600, 64});
  upload->Write(message);
  auto fetch = v1::KvSource::NewStub(channel)->Fetch(&fetch_context, FetchOf(ticket));
  v1::PrefillRequest request = PrefillOf(1000);
  request.mutable_delivery()->mutable_inline_()->set_chunk_bytes(kChunkBytesMin);
  auto download = v1::Prefill::NewStub(channel)->Prefill(&download_context, request);

  v1::AttendResponse response;
  EXPECT_FALSE(upload->Read(&response));
  EXPECT_EQ(upload->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(Eventually([&] { return node.ledger.bytes_held() == lease_bytes; }))
      << node.ledger.bytes_held() << " and not " << lease_bytes;
  // What had come before the deadline is read; then it shows.
  v1::KvChunk chunk;
  while (fetch->Read(&chunk)) {
  }
  EXPECT_EQ(fetch->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  v1::PrefillEvent event;
  while (download->Read(&event)) {
  }
  EXPECT_EQ(download->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(node.NewClient()->Release(ticket).ok());
  EXPECT_TRUE(node.NothingHeld());
}

}  // namespace
}  // namespace pbs::server
