// Spec: PrefillRequest.capture_query_layers and FetchRequest.queries over real gRPC.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "pbs/v1/kv.grpc.pb.h"
#include "tests/integration/test_node.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;

v1::PrefillRequest CaptureOf(int32_t num_tokens, const std::vector<int32_t>& layers) {
  v1::PrefillRequest request = LeaseOf(num_tokens);
  request.mutable_capture_query_layers()->Add(layers.begin(), layers.end());
  return request;
}

class CaptureSpec : public testing::Test {
 protected:
  absl::StatusOr<v1::Done> Prefill(const v1::PrefillRequest& request) {
    PrefillEvents events;
    return node_.NewClient()->Prefill(request, events);
  }

  grpc::Status FetchQueries(const v1::KvTicket& ticket, int32_t layer_begin,
                            std::vector<v1::KvChunk>& chunks) {
    auto stub = v1::KvSource::NewStub(node_.NewNarrowChannel());
    grpc::ClientContext context;
    v1::FetchRequest request;
    *request.mutable_ticket() = ticket;
    request.set_queries(true);
    request.set_layer_begin(layer_begin);
    auto reader = stub->Fetch(&context, request);
    v1::KvChunk chunk;
    while (reader->Read(&chunk)) chunks.push_back(chunk);
    return reader->Finish();
  }

  TestNode node_;
};

// The tiny model has 3 layers, 4 query heads, 2 KV heads of 32, f32.
TEST_F(CaptureSpec, QueriesAreDescribedFetchedAndFreedWithTheLease) {
  const auto done = Prefill(CaptureOf(100, {0, 2}));
  ASSERT_TRUE(done.ok()) << done.status();
  auto client = node_.NewClient();
  const auto kv = client->Describe(done->ticket());
  ASSERT_TRUE(kv.ok()) << kv.status();
  EXPECT_THAT(kv->query_layers(), ElementsAre(0, 2));
  EXPECT_EQ(kv->num_query_heads(), 4);
  EXPECT_EQ(kv->query_bytes(), 2 * 4 * 100 * 32 * 4);
  EXPECT_EQ(kv->bytes(), 2 * 3 * 2 * 100 * 32 * 4);

  std::vector<v1::KvChunk> chunks;
  ASSERT_TRUE(FetchQueries(done->ticket(), 1, chunks).ok());
  size_t bytes = 0;
  for (const v1::KvChunk& chunk : chunks) {
    EXPECT_EQ(chunk.kind(), v1::KvChunk::Q);
    EXPECT_EQ(chunk.layer(), 2);
    bytes += chunk.payload().size();
  }
  EXPECT_EQ(bytes, 4u * 100 * 32 * 4);
  ASSERT_TRUE(client->Release(done->ticket()).ok());
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(CaptureSpec, ThePlannedBytesIncludeTheQueries) {
  const auto plain = Prefill(CaptureOf(100, {}));
  const auto captured = Prefill(CaptureOf(100, {1}));
  ASSERT_TRUE(plain.ok() && captured.ok());
  EXPECT_EQ(captured->stats().planned_bytes() - plain->stats().planned_bytes(),
            4 * 100 * 32 * 4);
  EXPECT_EQ(captured->sparsity_digest(), plain->sparsity_digest());
}

TEST_F(CaptureSpec, AFetchOfQueriesThatWereNotCapturedIsRefusedAndHoldsNothing) {
  const auto done = Prefill(CaptureOf(50, {}));
  ASSERT_TRUE(done.ok()) << done.status();
  const int64_t held = node_.ledger.bytes_held();
  std::vector<v1::KvChunk> chunks;
  const grpc::Status refused = FetchQueries(done->ticket(), 0, chunks);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(refused.error_message(),
            "queries true: the prefill of this ticket had no capture_query_layers");
  EXPECT_TRUE(Eventually([&] { return node_.ledger.bytes_held() == held; }));
}

TEST_F(CaptureSpec, ARefusedCaptureLeavesNoLease) {
  const auto refused = Prefill(CaptureOf(50, {3}));
  EXPECT_EQ(refused.status(),
            absl::InvalidArgumentError("capture_query_layers[0] 3 is outside [0, 2]"));
  EXPECT_EQ(node_.leases.size(), 0);
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(CaptureSpec, AKeyNamesTheLayersToo) {
  v1::PrefillRequest request = CaptureOf(50, {0});
  request.set_idempotency_key("key");
  ASSERT_TRUE(Prefill(request).ok());
  EXPECT_TRUE(Prefill(request).ok());
  v1::PrefillRequest other = CaptureOf(50, {1});
  other.set_idempotency_key("key");
  EXPECT_EQ(Prefill(other).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace pbs::server
