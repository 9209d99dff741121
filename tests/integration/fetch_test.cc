// Spec: KvSource of kv.proto over real gRPC.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <optional>
#include <vector>

#include "pbs/v1/kv.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "server/service/transfer_record.h"
#include "tests/integration/test_node.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;

v1::Done PrefillWithLease(TestNode& node, const v1::PrefillRequest& request) {
  PrefillEvents events;
  const auto done = node.NewClient()->Prefill(request, events);
  EXPECT_TRUE(done.ok()) << done.status();
  return *done;
}

v1::FetchRequest FetchOf(const v1::KvTicket& ticket) {
  v1::FetchRequest request;
  *request.mutable_ticket() = ticket;
  return request;
}

std::vector<float> Floats(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / static_cast<size_t>(DTypeBytes(dtype)));
  ConvertElements(bytes.data(), dtype, values.data(), DType::kF32,
                  static_cast<int64_t>(values.size()));
  return values;
}

TEST(KvSourceSpec, DescribesALease) {
  TestNode node;
  v1::PrefillRequest request = LeaseOf(100);
  request.mutable_delivery()->mutable_lease()->set_ttl_seconds(30);
  const v1::Done done = PrefillWithLease(node, request);
  const auto kv = node.NewClient()->Describe(done.ticket());
  ASSERT_TRUE(kv.ok()) << kv.status();
  EXPECT_EQ(kv->model(), "tiny");
  EXPECT_EQ(kv->state(), v1::COMPLETE);
  EXPECT_EQ(kv->num_layers(), 3);
  EXPECT_EQ(kv->layers_ready(), 3);
  EXPECT_EQ(kv->num_kv_heads(), 2);
  EXPECT_EQ(kv->head_dim(), 32);
  EXPECT_EQ(kv->num_tokens(), 100);
  EXPECT_EQ(kv->dtype(), v1::F32);
  EXPECT_EQ(kv->bytes(), 2 * 3 * 2 * 100 * 32 * 4);
  EXPECT_EQ(kv->first_token_id(), done.first_token_id());
  EXPECT_EQ(kv->lease().ttl_seconds(), 30);
  EXPECT_EQ(kv->lease().expires_unix_ms(), done.lease_expires_unix_ms());
}

TEST(KvSourceSpec, PartsOfTheCacheAreSlicesOfTheWhole) {
  TestNode node;
  auto client = node.NewClient();
  const v1::Done done = PrefillWithLease(node, LeaseOf(200));
  KvArrays whole, part;
  ASSERT_TRUE(client->Fetch(FetchOf(done.ticket()), whole).ok());

  v1::FetchRequest request = FetchOf(done.ticket());
  request.set_layer_begin(1);
  request.set_layer_count(1);
  request.set_token_begin(50);
  request.set_token_count(17);
  request.set_head_begin(1);
  request.set_head_count(1);
  request.set_layout(v1::NHD);
  request.set_dtype(v1::F16);
  ASSERT_TRUE(client->Fetch(request, part).ok());
  EXPECT_THAT(part.layers, ElementsAre(1));
  const auto all = Floats(whole.arrays.at({1, v1::KvChunk::K}), DType::kF32);
  const auto some = Floats(part.arrays.at({1, v1::KvChunk::K}), DType::kF16);
  ASSERT_EQ(some.size(), 17u * 32);
  for (size_t i = 0; i < some.size(); ++i) {
    EXPECT_EQ(some[i], ToFloat(ToF16(all[(200 + 50) * 32 + i])));
  }
}

TEST(KvSourceSpec, PartsThatWereFetchedNoLongerWaitForExport) {
  TestNode node;
  auto client = node.NewClient();
  const v1::Done done = PrefillWithLease(node, LeaseOf(200));
  const double held = 2 * 3 * 2 * 200 * 32 * 4;  // 3 layers, 2 heads, f32
  EXPECT_EQ(node.metrics.kv.export_outstanding.Value(), held);
  KvArrays arrays;
  v1::FetchRequest request = FetchOf(done.ticket());
  request.set_token_count(50);
  request.set_head_begin(1);
  request.set_dtype(v1::F16);
  ASSERT_TRUE(client->Fetch(request, arrays).ok());
  EXPECT_EQ(node.metrics.kv.export_outstanding.Value(), held - held / 4 / 2);

  KvArrays rest;  // as after a break in layer 1: what it covers counts
  v1::FetchRequest resumed = FetchOf(done.ticket());
  resumed.set_layer_begin(1);
  ASSERT_TRUE(client->Fetch(resumed, rest).ok());
  EXPECT_EQ(node.metrics.kv.export_outstanding.Value(),
            held - held / 4 / 2 - held * 2 / 3);
  ASSERT_TRUE(client->Release(done.ticket()).ok());
  EXPECT_EQ(node.metrics.kv.export_outstanding.Value(), 0);
}

TEST(KvSourceSpec, AResumedFetchCoversWhatItSends) {
  TestNode node;
  auto stub = v1::KvSource::NewStub(node.NewChannel());
  const v1::Done done = PrefillWithLease(node, LeaseOf(200));
  const double row = 32 * 4;
  const double held = 2 * 3 * 2 * 200 * row;
  v1::FetchRequest request = FetchOf(done.ticket());
  request.set_layer_begin(1);
  request.mutable_resume()->set_kind(v1::KvChunk::V);
  request.mutable_resume()->set_head(1);
  request.mutable_resume()->set_token(150);
  grpc::ClientContext context;
  auto reader = stub->Fetch(&context, request);
  v1::KvChunk chunk;
  ASSERT_TRUE(reader->Read(&chunk));
  EXPECT_EQ(chunk.layer(), 1);
  EXPECT_EQ(chunk.kind(), v1::KvChunk::V);
  EXPECT_EQ(chunk.byte_offset(), 350 * row);
  EXPECT_EQ(chunk.payload().size(), 50 * row);
  EXPECT_TRUE(chunk.has_layer_digest());
  while (reader->Read(&chunk)) {
  }
  ASSERT_TRUE(reader->Finish().ok());
  const double sent = 50 * row + held / 3;  // and all of layer 2
  EXPECT_EQ(node.metrics.kv.transfer_bytes.Value(), sent);
  EXPECT_TRUE(Eventually(
      [&] { return node.metrics.kv.export_outstanding.Value() == held - sent; }));
  ASSERT_TRUE(node.NewClient()->Release(done.ticket()).ok());
  EXPECT_TRUE(node.NothingHeld());
}

TEST(KvSourceSpec, ACacheAsF8E4M3IsWidenedToTheAskedDtype) {
  TestNode node;
  auto client = node.NewClient();
  const v1::Done done = PrefillWithLease(node, LeaseOf(200));
  KvArrays held, wide, half;
  ASSERT_TRUE(client->Fetch(FetchOf(done.ticket()), held).ok());
  const double before = node.metrics.kv.transfer_bytes.Value();
  v1::FetchRequest request = FetchOf(done.ticket());
  request.set_dtype(v1::F8_E4M3);
  request.set_page_tokens(16);
  ASSERT_TRUE(client->Fetch(request, wide).ok());
  // A byte an element, and 13 scales of 4 bytes for each layer, kind and head.
  EXPECT_EQ(node.metrics.kv.transfer_bytes.Value() - before,
            2 * 3 * 2 * (200 * 32 + 13 * 4));
  ASSERT_TRUE(client->Fetch(request, half, {}, v1::F16).ok());
  for (const auto& [key, bytes] : held.arrays) {
    const auto exact = Floats(bytes, DType::kF32);
    const auto got = Floats(wide.arrays.at(key), DType::kF32);
    const auto rounded = Floats(half.arrays.at(key), DType::kF16);
    ASSERT_EQ(got.size(), exact.size());
    const auto [least, greatest] = std::minmax_element(exact.begin(), exact.end());
    const float step = std::max(-*least, *greatest) / 448 * 0x1p-10f;
    for (size_t i = 0; i < exact.size(); ++i) {
      ASSERT_LE(std::abs(got[i] - exact[i]), std::max(std::abs(exact[i]) / 16, step));
      ASSERT_EQ(rounded[i], ToFloat(ToF16(got[i])));
    }
  }
  ASSERT_TRUE(client->Release(done.ticket()).ok());
  EXPECT_TRUE(node.NothingHeld());
}

TEST(KvSourceSpec, ATransferIsASendStage) {
  TestNode node;
  auto client = node.NewClient();
  const v1::Done done = PrefillWithLease(node, LeaseOf(50));
  const auto sends = [&] {
    return node.metrics.engine.StageTime(Stage::kSend).Collect().histogram.sample_count;
  };
  EXPECT_EQ(sends(), 0u);
  KvArrays arrays;
  ASSERT_TRUE(client->Fetch(FetchOf(done.ticket()), arrays).ok());
  EXPECT_EQ(sends(), 1u);
  v1::PrefillRequest request = PrefillOf(50);
  request.mutable_delivery()->mutable_inline_();
  PrefillEvents events;
  ASSERT_TRUE(client->Prefill(request, events, &arrays).ok());
  EXPECT_EQ(sends(), 2u);
}

TEST(KvSourceSpec, ALeaseMayBeFetchedAgainUntilReleased) {
  TestNode node;
  auto client = node.NewClient();
  const v1::Done done = PrefillWithLease(node, LeaseOf(50));
  for (int i = 0; i < 3; ++i) {
    KvArrays arrays;
    ASSERT_TRUE(client->Fetch(FetchOf(done.ticket()), arrays).ok());
  }
  EXPECT_EQ(node.metrics.kv.transfer_bytes.Value(), 3 * 2 * 3 * 2 * 50 * 32 * 4);
  EXPECT_EQ(node.metrics.kv.export_outstanding.Value(), 0);
  ASSERT_TRUE(client->Release(done.ticket()).ok());
  KvArrays arrays;
  EXPECT_EQ(client->Fetch(FetchOf(done.ticket()), arrays), LeaseStore::NotFound());
  EXPECT_TRUE(node.NothingHeld());
}

TEST(KvSourceSpec, ExpiryFreesAndTheTicketIsNotFound) {
  TestNode node;
  auto client = node.NewClient();
  const v1::Done done = PrefillWithLease(node, LeaseOf(50));
  ASSERT_TRUE(client->Renew(done.ticket(), 100).ok());
  node.Advance(absl::Seconds(99));
  EXPECT_TRUE(client->Describe(done.ticket()).ok());
  node.Advance(absl::Seconds(1));
  EXPECT_EQ(client->Describe(done.ticket()).status(), LeaseStore::NotFound());
  EXPECT_EQ(client->Renew(done.ticket(), 1).status(), LeaseStore::NotFound());
  EXPECT_EQ(client->Release(done.ticket()), LeaseStore::NotFound());
  EXPECT_TRUE(node.NothingHeld());
}

TEST(KvSourceSpec, ATicketOfAnotherServerIsNotFoundHere) {
  TestNode one, other;
  const v1::Done done = PrefillWithLease(one, LeaseOf(50));
  EXPECT_EQ(other.NewClient()->Describe(done.ticket()).status(),
            LeaseStore::NotFound());
  v1::KvTicket forged = done.ticket();
  forged.set_epoch(other.leases.epoch());
  EXPECT_EQ(other.NewClient()->Describe(forged).status(), LeaseStore::NotFound());
}

// A prefill whose steps the test takes, and a fetch that follows it.
class FollowSpec : public testing::Test {
 protected:
  FollowSpec() {
    // Owned by the future's thread until admitted.
    events_.on_admitted = [this](const v1::Admitted& admitted) {
      admitted_.set_value(admitted.ticket());
    };
    prefill_ = std::async(std::launch::async, [this] {
      return prefill_client_->Prefill(LeaseOf(120), events_);
    });
    ticket_ = admitted_.get_future().get();
    arrays_.on_layer = [this](int32_t) { ++layers_fetched_; };
  }

  void StartFetch() {
    fetch_ = std::async(std::launch::async, [this] {
      return fetch_client_->Fetch(FetchOf(ticket_), arrays_);
    });
  }

  bool StepUntilPrefillEnds() {
    return node_.StepUntil([&] {
      return prefill_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    });
  }

  TestNode node_{{.executor_thread = false}};
  std::unique_ptr<client::Client> prefill_client_ = node_.NewClient();
  std::unique_ptr<client::Client> fetch_client_ = node_.NewClient();
  PrefillEvents events_;
  std::promise<v1::KvTicket> admitted_;
  std::future<absl::StatusOr<v1::Done>> prefill_;
  v1::KvTicket ticket_;
  KvArrays arrays_;
  std::atomic<int> layers_fetched_ = 0;
  std::future<absl::Status> fetch_;
};

TEST_F(FollowSpec, AFetchFollowsAPrefillLayerByLayer) {
  StartFetch();
  for (int layer = 1; layer <= 3; ++layer) {
    // The layer moves while later ones have not run.
    ASSERT_TRUE(node_.engine.executor().RunOneStep());
    ASSERT_TRUE(Eventually([&] { return layers_fetched_ == layer; }));
  }
  EXPECT_TRUE(fetch_.get().ok());
  const auto running = node_.NewClient()->Describe(ticket_);
  ASSERT_TRUE(running.ok());
  EXPECT_EQ(running->layers_ready(), 3);
  ASSERT_TRUE(StepUntilPrefillEnds());
  EXPECT_TRUE(prefill_.get().ok());
  EXPECT_TRUE(node_.NewClient()->Release(ticket_).ok());
}

TEST_F(FollowSpec, ARunningLeaseHasNoExpiryAndNoToken) {
  ASSERT_TRUE(node_.engine.executor().RunOneStep());
  const auto kv = node_.NewClient()->Describe(ticket_);
  ASSERT_TRUE(kv.ok());
  EXPECT_EQ(kv->state(), v1::RUNNING);
  EXPECT_EQ(kv->layers_ready(), 1);
  EXPECT_EQ(kv->lease().expires_unix_ms(), 0);
  EXPECT_FALSE(kv->has_first_token_id());
  node_.Advance(absl::Minutes(50));
  EXPECT_TRUE(node_.NewClient()->Describe(ticket_).ok());
  ASSERT_TRUE(StepUntilPrefillEnds());
  EXPECT_GT(prefill_.get()->lease_expires_unix_ms(), 0);
}

TEST_F(FollowSpec, AFetchOfAPrefillThatDiesIsUnavailable) {
  StartFetch();
  ASSERT_TRUE(node_.engine.executor().RunOneStep());
  ASSERT_TRUE(Eventually([&] { return layers_fetched_ == 1; }));
  node_.engine.executor().Shutdown();
  ASSERT_TRUE(StepUntilPrefillEnds());
  EXPECT_FALSE(prefill_.get().ok());
  const absl::Status status = fetch_.get();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(FollowSpec, ReleaseWhileThePrefillRunsEndsBothAndFrees) {
  StartFetch();
  ASSERT_TRUE(node_.engine.executor().RunOneStep());
  ASSERT_TRUE(Eventually([&] { return layers_fetched_ == 1; }));
  ASSERT_TRUE(node_.NewClient()->Release(ticket_).ok());
  EXPECT_EQ(fetch_.get(), LeaseStore::NotFound());  // at once, before the next layer
  ASSERT_TRUE(StepUntilPrefillEnds());
  EXPECT_EQ(prefill_.get().status(),
            absl::AbortedError("the lease was released while its prefill ran"));
  EXPECT_TRUE(node_.NothingHeld());
}

TEST_F(FollowSpec, AFetchMayGoAwayWhileItWaits) {
  auto stub = v1::KvSource::NewStub(node_.NewChannel());
  for (int i = 0; i < 20; ++i) {
    grpc::ClientContext context;
    auto reader = stub->Fetch(&context, FetchOf(ticket_));
    reader->WaitForInitialMetadata();
    context.TryCancel();
    v1::KvChunk chunk;
    EXPECT_FALSE(reader->Read(&chunk));
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  // The server may hear of it after the client: there is nothing to send before.
  ASSERT_TRUE(Eventually([&] {
    const auto code = absl::StatusCode::kCancelled;
    return node_.metrics.rpc.Requests(Rpc::kFetch, code).Value() == 20;
  }));
  ASSERT_TRUE(StepUntilPrefillEnds());
  EXPECT_TRUE(prefill_.get().ok());
  EXPECT_TRUE(node_.NewClient()->Release(ticket_).ok());
  EXPECT_TRUE(node_.NothingHeld());
  // None of them had begun.
  EXPECT_EQ(node_.metrics.kv.TransferFailed(TransferFailure::kCancelled).Value(), 0);
}

// ---- transfers that fail

struct TransferCase {
  const char* name;
  bool begins;
  bool completes;
  absl::StatusCode code;
  std::optional<TransferFailure> counted;
  bool stopping = false;
};

class TransferRecordSpec : public testing::TestWithParam<TransferCase> {};

TEST_P(TransferRecordSpec, CountsWhatHadBegunAndWasNotComplete) {
  TestNode node;
  const ServiceParts parts = {node.engines, node.leases, node.ledger, node.metrics,
                              *node.log,    node.clock,  node.timers};
  ServiceContext service({}, parts);
  if (GetParam().stopping) service.SetStopping();
  TransferRecord record(service);
  if (GetParam().begins) record.AddChunk(1);
  if (GetParam().completes) record.Complete();
  record.Fail(absl::Status(GetParam().code, "over"));
  for (size_t i = 0; i < kTransferFailureNames.size(); ++i) {
    const auto reason = static_cast<TransferFailure>(i);
    EXPECT_EQ(node.metrics.kv.TransferFailed(reason).Value(),
              GetParam().counted == reason ? 1 : 0);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, TransferRecordSpec,
    testing::Values(
        TransferCase{"never_begun", false, false, absl::StatusCode::kCancelled, {}},
        TransferCase{"complete", true, true, absl::StatusCode::kCancelled, {}},
        TransferCase{"the_reader_left", true, false, absl::StatusCode::kCancelled,
                     TransferFailure::kCancelled},
        TransferCase{"the_lease_is_gone", true, false, absl::StatusCode::kNotFound,
                     TransferFailure::kLeaseGone},
        TransferCase{"the_prefill_ended", true, false, absl::StatusCode::kUnavailable,
                     TransferFailure::kPrefillFailed},
        TransferCase{"the_readers_deadline", true, false,
                     absl::StatusCode::kDeadlineExceeded, TransferFailure::kDeadline},
        TransferCase{"the_server_stopped", true, false, absl::StatusCode::kUnavailable,
                     TransferFailure::kShutdown, /*stopping=*/true},
        TransferCase{"the_prefill_broke", true, false, absl::StatusCode::kInternal,
                     TransferFailure::kPrefillFailed}),
    testing_support::CaseName());

// ---- readers that stall

TEST(StalledReaderSpec, IsCutAndItsCacheFreedAfterTheLeaseIsGone) {
  NodeOptions options;
  options.service.transport.write_stall_seconds_max = 30;
  TestNode node(options);
  const v1::Done done = PrefillWithLease(node, LeaseOf(1000));
  auto stub = v1::KvSource::NewStub(node.NewNarrowChannel());
  grpc::ClientContext context;
  auto reader = stub->Fetch(&context, FetchOf(done.ticket()));  // and reads nothing
  ASSERT_TRUE(Eventually([&] { return node.metrics.kv.transfer_bytes.Value() > 0; }));
  ASSERT_TRUE(node.NewClient()->Release(done.ticket()).ok());
  EXPECT_GT(node.ledger.bytes_held(), 0);
  EXPECT_TRUE(Eventually([&] {
    node.Advance(absl::Seconds(30));
    return node.ledger.bytes_held() == 0;
  }));
  // Cut, or woken by the last of what the transport took: then the lease is gone.
  EXPECT_TRUE(Eventually([&] {
    return node.metrics.kv.TransferFailed(TransferFailure::kCancelled).Value() +
               node.metrics.kv.TransferFailed(TransferFailure::kLeaseGone).Value() ==
           1;
  }));
}

}  // namespace
}  // namespace pbs::server
