// Spec: server/transfer/lease_store.h.
#include "server/transfer/lease_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

constexpr KvShape kShape = {2, 1, 32, 4, DType::kF32};

class LeaseStoreSpec : public testing::Test {
 protected:
  static LeaseRequest Request(const std::string& key = "",
                              const std::string& fingerprint = "f") {
    LeaseRequest request;
    request.model = "m";
    request.model_digest = "md";
    request.sparsity_digest = "exact";
    request.idempotency_key = key;
    request.fingerprint = fingerprint;
    return request;
  }

  // A lease whose prefill runs.
  PendingLease Run(const LeaseRequest& request) {
    auto begun = store_.Begin(request);
    EXPECT_TRUE(begun.ok()) << begun.status();
    EXPECT_FALSE(begun->existing.has_value());
    begun->pending.Attach(testing_support::MakeHeldKv(kShape));
    return std::move(begun->pending);
  }
  v1::KvTicket Hold(const LeaseRequest& request) {
    PendingLease pending = Run(request);
    v1::Done done;
    done.set_first_token_id(7);
    EXPECT_TRUE(pending.Complete(done, {}).ok());
    return pending.ticket();
  }
  void Advance(absl::Duration duration) {
    clock_.Advance(duration);
    timers_.RunDue();
  }

  ManualClock clock_;
  TimerQueue timers_{clock_};
  prometheus::Registry registry_;
  KvMetrics metrics_{registry_};
  LeaseStore store_{
      {.ttl_seconds_default = 60, .ttl_seconds_max = 600, .leases_max = 3},
      /*epoch=*/77,
      clock_,
      timers_,
      metrics_};
};

TEST_F(LeaseStoreSpec, TicketsSayWhereTheirCacheIs) {
  store_.SetEndpoint("node-7:50051");
  v1::KvTicket ticket = Hold(Request());
  EXPECT_EQ(ticket.endpoint(), "node-7:50051");
  EXPECT_EQ(store_.Find(ticket)->ticket.endpoint(), "node-7:50051");
  // Whoever rewrote the address on the way reached this server all the same.
  ticket.set_endpoint("localhost:9000");
  EXPECT_TRUE(store_.Release(ticket).ok());
}

TEST_F(LeaseStoreSpec, ATicketIs128RandomBitsAndTheEpoch) {
  const v1::KvTicket first = Hold(Request()), second = Hold(Request());
  EXPECT_THAT(first.handle(), testing::MatchesRegex("[0-9a-f]{32}"));
  EXPECT_NE(first.handle(), second.handle());
  EXPECT_EQ(first.epoch(), 77u);
  EXPECT_EQ(first.model_digest(), "md");
  EXPECT_EQ(first.sparsity_digest(), "exact");
}

TEST_F(LeaseStoreSpec, ATicketFindsItsCacheFromAttachOn) {
  auto begun = store_.Begin(Request());
  EXPECT_TRUE(absl::IsNotFound(store_.Find(begun->pending.ticket()).status()));
  begun->pending.Attach(testing_support::MakeHeldKv(kShape));
  const auto lease = store_.Find(begun->pending.ticket());
  ASSERT_TRUE(lease.ok());
  EXPECT_EQ(lease->done, nullptr);
  EXPECT_EQ(lease->expires, absl::InfiniteFuture());
}

TEST_F(LeaseStoreSpec, TimeCountsFromCompletion) {
  LeaseRequest request = Request();
  request.ttl_seconds = 10;
  PendingLease pending = Run(request);
  Advance(absl::Hours(1));
  ASSERT_TRUE(store_.Find(pending.ticket()).ok());
  const auto done = pending.Complete({}, {});
  ASSERT_TRUE(done.ok());
  EXPECT_EQ((*done)->lease_expires_unix_ms(),
            absl::ToUnixMillis(clock_.Now() + absl::Seconds(10)));
  Advance(absl::Milliseconds(9999));
  EXPECT_TRUE(store_.Find(pending.ticket()).ok());
  Advance(absl::Milliseconds(1));
  EXPECT_TRUE(absl::IsNotFound(store_.Find(pending.ticket()).status()));
}

TEST_F(LeaseStoreSpec, ExpiryFreesAndIsCounted) {
  const v1::KvTicket ticket = Hold(Request());
  const std::weak_ptr<HeldKv> cache = store_.Find(ticket)->kv;
  Advance(absl::Seconds(60));
  EXPECT_TRUE(cache.expired());
  EXPECT_EQ(store_.size(), 0);
  EXPECT_EQ(metrics_.lease_expired.Value(), 1);
  EXPECT_EQ(metrics_.leases.Value(), 0);
  EXPECT_EQ(metrics_.export_outstanding.Value(), 0);
}

TEST_F(LeaseStoreSpec, AnExpiredLeaseIsGoneEvenWhenItsTimerIsLate) {
  const v1::KvTicket ticket = Hold(Request("key"));
  clock_.Advance(absl::Seconds(60));  // the timers have not run
  EXPECT_TRUE(absl::IsNotFound(store_.Find(ticket).status()));
  EXPECT_TRUE(absl::IsNotFound(store_.Renew(ticket, 10).status()));
  const auto again = store_.Begin(Request("key"));
  ASSERT_TRUE(again.ok());
  EXPECT_FALSE(again->existing.has_value());
}

TEST_F(LeaseStoreSpec, RenewExtendsFromNow) {
  const v1::KvTicket ticket = Hold(Request());
  Advance(absl::Seconds(50));
  const auto renewed = store_.Renew(ticket, 600);
  ASSERT_TRUE(renewed.ok());
  EXPECT_EQ(renewed->expires, clock_.Now() + absl::Seconds(600));
  Advance(absl::Seconds(599));
  EXPECT_TRUE(store_.Find(ticket).ok());
  Advance(absl::Seconds(1));
  EXPECT_TRUE(absl::IsNotFound(store_.Find(ticket).status()));
}

TEST_F(LeaseStoreSpec, RenewWhileThePrefillRunsCountsFromCompletion) {
  PendingLease pending = Run(Request());
  ASSERT_TRUE(store_.Renew(pending.ticket(), 5).ok());
  ASSERT_TRUE(pending.Complete({}, {}).ok());
  EXPECT_EQ(store_.Find(pending.ticket())->expires, clock_.Now() + absl::Seconds(5));
}

TEST_F(LeaseStoreSpec, WhoReadsLearnsOfTheEndAtOnce) {
  for (const bool expires : {false, true}) {
    const v1::KvTicket ticket = Hold(Request());
    const std::shared_ptr<HeldKv> reader = store_.Find(ticket)->kv;
    int told = 0;
    reader->WhenReady(kNoLayer, [&] { ++told; });
    EXPECT_EQ(told, 0);
    if (expires) {
      Advance(absl::Seconds(60));
    } else {
      ASSERT_TRUE(store_.Release(ticket).ok());
    }
    EXPECT_EQ(told, 1);
    EXPECT_EQ(reader->readable(), LeaseStore::NotFound());
  }
}

TEST_F(LeaseStoreSpec, ReleaseFreesAtOnce) {
  const v1::KvTicket ticket = Hold(Request());
  const std::weak_ptr<HeldKv> cache = store_.Find(ticket)->kv;
  ASSERT_TRUE(store_.Release(ticket).ok());
  EXPECT_TRUE(cache.expired());
  EXPECT_TRUE(absl::IsNotFound(store_.Release(ticket)));
  EXPECT_EQ(metrics_.lease_expired.Value(), 0);
}

TEST_F(LeaseStoreSpec, UnknownForeignExpiredAndReleasedTicketsGetOneAnswer) {
  const v1::KvTicket released = Hold(Request());
  ASSERT_TRUE(store_.Release(released).ok());
  const v1::KvTicket expired = Hold(Request());
  Advance(absl::Seconds(60));
  const v1::KvTicket good = Hold(Request());
  v1::KvTicket foreign = good;
  foreign.set_epoch(78);
  v1::KvTicket unknown = good;
  unknown.set_handle(std::string(32, '0'));
  v1::KvTicket malformed = good;
  malformed.set_handle("../etc");
  const absl::Status expected = LeaseStore::NotFound();
  for (const v1::KvTicket& ticket :
       {released, expired, foreign, unknown, malformed, v1::KvTicket()}) {
    EXPECT_EQ(store_.Find(ticket).status(), expected);
    EXPECT_EQ(store_.Renew(ticket, 1).status(), expected);
    EXPECT_EQ(store_.Release(ticket), expected);
  }
  EXPECT_TRUE(store_.Find(good).ok());
}

TEST_F(LeaseStoreSpec, ADigestThatTheTicketStatesMustBeTheLeases) {
  v1::KvTicket ticket = Hold(Request());
  ticket.clear_model_digest();
  ticket.clear_sparsity_digest();
  EXPECT_TRUE(store_.Find(ticket).ok());
  ticket.set_model_digest("other");
  EXPECT_EQ(store_.Find(ticket).status(),
            absl::FailedPreconditionError(
                "model_digest other of the ticket is not the lease's md"));
  ticket.set_model_digest("md");
  ticket.set_sparsity_digest("pbs-1");
  EXPECT_EQ(store_.Find(ticket).status(),
            absl::FailedPreconditionError(
                "sparsity_digest pbs-1 of the ticket is not the lease's exact"));
}

TEST_F(LeaseStoreSpec, ALongDigestIsCountedAndNotRepeated) {
  v1::KvTicket ticket = Hold(Request());
  ticket.set_model_digest(std::string(5'000'000, 'd'));
  EXPECT_EQ(store_.Find(ticket).status(),
            absl::FailedPreconditionError(
                "model_digest of the ticket has 5000000 bytes, more than 128, and is "
                "not the lease's md"));
}

TEST_F(LeaseStoreSpec, ALeaseDroppedBeforeCompletionIsNoMore) {
  v1::KvTicket ticket;
  std::shared_ptr<HeldKv> reader;
  {
    const PendingLease pending = Run(Request("key"));
    ticket = pending.ticket();
    reader = store_.Find(ticket)->kv;
    EXPECT_TRUE(reader->readable().ok());
  }
  EXPECT_TRUE(absl::IsUnavailable(reader->readable()));
  EXPECT_TRUE(absl::IsNotFound(store_.Find(ticket).status()));
  EXPECT_EQ(store_.size(), 0);
  EXPECT_FALSE(store_.Begin(Request("key"))->existing.has_value());
}

TEST_F(LeaseStoreSpec, ReleaseWhileThePrefillRunsAbortsIt) {
  PendingLease pending = Run(Request());
  const std::shared_ptr<HeldKv> kv = store_.Find(pending.ticket())->kv;
  bool told = false;
  kv->WhenReady(kNoLayer, [&] { told = true; });
  ASSERT_TRUE(store_.Release(pending.ticket()).ok());
  EXPECT_TRUE(told);
  EXPECT_EQ(kv->readable(), LeaseStore::NotFound());
  EXPECT_EQ(pending.Complete({}, {}).status(),
            absl::AbortedError("the lease was released while its prefill ran"));
}

TEST_F(LeaseStoreSpec, HoldsAtMostLeasesMaxRunningOnesIncluded) {
  Hold(Request());
  const PendingLease second = Run(Request()), third = Run(Request());
  EXPECT_EQ(store_.Begin(Request()).status(),
            absl::ResourceExhaustedError("leases held 3 reach leases_max 3"));
}

struct TtlCase {
  const char* name;
  int32_t ttl_seconds;
  const char* message;  // "" when accepted
};

class LeaseTtlSpec : public LeaseStoreSpec,
                     public testing::WithParamInterface<TtlCase> {};

TEST_P(LeaseTtlSpec, MustBeInsideItsRange) {
  LeaseRequest request = Request();
  request.ttl_seconds = GetParam().ttl_seconds;
  EXPECT_EQ(std::string(store_.Begin(request).status().message()), GetParam().message);
  const v1::KvTicket ticket = Hold(Request());
  EXPECT_EQ(
      std::string(store_.Renew(ticket, GetParam().ttl_seconds).status().message()),
      GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, LeaseTtlSpec,
    testing::Values(TtlCase{"one", 1, ""}, TtlCase{"max", 600, ""},
                    TtlCase{"zero", 0, "ttl_seconds 0 is outside [1, 600]"},
                    TtlCase{"negative", -5, "ttl_seconds -5 is outside [1, 600]"},
                    TtlCase{"past_max", 601, "ttl_seconds 601 is outside [1, 600]"}),
    testing_support::CaseName());

TEST_F(LeaseStoreSpec, AKeyOfDoneWorkGivesTheSameTicketResultAndNewTime) {
  const v1::KvTicket ticket = Hold(Request("key"));
  Advance(absl::Seconds(40));
  const auto again = store_.Begin(Request("key"));
  ASSERT_TRUE(again.ok());
  ASSERT_TRUE(again->existing.has_value());
  EXPECT_FALSE(again->pending.valid());
  EXPECT_EQ(again->existing->ticket.handle(), ticket.handle());
  EXPECT_EQ(again->existing->done->first_token_id(), 7u);
  EXPECT_EQ(again->existing->expires, clock_.Now() + absl::Seconds(60));
  EXPECT_EQ(store_.size(), 1);
}

TEST_F(LeaseStoreSpec, AKeyOfRunningWorkIsAborted) {
  const PendingLease pending = Run(Request("key"));
  EXPECT_EQ(
      store_.Begin(Request("key")).status(),
      absl::AbortedError("the request with this idempotency_key is already running"));
}

TEST_F(LeaseStoreSpec, AKeyWithAnotherRequestIsRefused) {
  Hold(Request("key"));
  EXPECT_EQ(store_.Begin(Request("key", "other")).status(),
            absl::InvalidArgumentError(
                "idempotency_key is in use by a request that differs from this one"));
}

TEST_F(LeaseStoreSpec, AKeyIsFreeAgainWhenItsLeaseIsGone) {
  ASSERT_TRUE(store_.Release(Hold(Request("key"))).ok());
  EXPECT_FALSE(store_.Begin(Request("key", "other"))->existing.has_value());
}

TEST_F(LeaseStoreSpec, BytesWaitForExportUntilFetchedOrGone) {
  const auto bytes = static_cast<double>(kShape.bytes());
  const v1::KvTicket first = Hold(Request()), second = Hold(Request());
  EXPECT_EQ(metrics_.export_outstanding.Value(), 2 * bytes);
  store_.MarkExported(first, kShape.bytes() / 4);
  EXPECT_EQ(metrics_.export_outstanding.Value(), 1.75 * bytes);
  store_.MarkExported(first, kShape.bytes() / 4);
  EXPECT_EQ(metrics_.export_outstanding.Value(), 1.5 * bytes);
  store_.MarkExported(first, kShape.bytes());  // some of it again
  EXPECT_EQ(metrics_.export_outstanding.Value(), bytes);
  ASSERT_TRUE(store_.Release(first).ok());
  EXPECT_EQ(metrics_.export_outstanding.Value(), bytes);
  ASSERT_TRUE(store_.Release(second).ok());
  EXPECT_EQ(metrics_.export_outstanding.Value(), 0);
}

TEST_F(LeaseStoreSpec, SaysWhenTheLastLeaseIsGone) {
  int calls = 0;
  store_.WhenEmpty([&] { ++calls; });
  EXPECT_EQ(calls, 1);
  const v1::KvTicket first = Hold(Request()), second = Hold(Request());
  store_.WhenEmpty([&] { ++calls; });
  ASSERT_TRUE(store_.Release(first).ok());
  EXPECT_EQ(calls, 1);
  Advance(absl::Seconds(60));
  EXPECT_EQ(calls, 2);
}

TEST_F(LeaseStoreSpec, TheResultsBytesLiveAsLongAsTheLease) {
  ByteLedger ledger(1000);
  PendingLease pending = Run(Request());
  ASSERT_TRUE(pending.Complete({}, *ledger.Reserve(400)).ok());
  EXPECT_EQ(ledger.bytes_held(), 400);
  ASSERT_TRUE(store_.Release(pending.ticket()).ok());
  EXPECT_EQ(ledger.bytes_held(), 0);
}

}  // namespace
}  // namespace pbs::server
