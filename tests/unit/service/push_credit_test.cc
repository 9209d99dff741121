// Spec: server/service/push_credit.h.
#include "server/service/push_credit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

constexpr char kHandle[] = "0123456789abcdef0123456789abcdef";
constexpr uint64_t kTotal = 1000;
constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();

v1::KvAck Ack(uint64_t received, uint64_t credit, const std::string& handle = kHandle) {
  v1::KvAck ack;
  ack.set_handle(handle);
  ack.set_bytes_received(received);
  ack.set_credit_bytes(credit);
  return ack;
}

TEST(PushCredit, NothingIsAllowedBeforeTheFirstAcknowledgement) {
  const PushCredit credit(kHandle, kTotal);
  EXPECT_FALSE(credit.Allows(1));
  EXPECT_EQ(credit.left(), 0u);
  EXPECT_FALSE(credit.complete());
}

TEST(PushCredit, APayloadIsAllowedWhenAllOfItFits) {
  PushCredit credit(kHandle, kTotal);
  ASSERT_TRUE(credit.Take(Ack(0, 100)).ok());
  EXPECT_TRUE(credit.Allows(100));
  EXPECT_FALSE(credit.Allows(101));
  credit.Send(60);
  EXPECT_EQ(credit.left(), 40u);
  EXPECT_FALSE(credit.Allows(41));
}

TEST(PushCredit, CreditCountsFromTheBytesOfItsAcknowledgement) {
  PushCredit credit(kHandle, kTotal);
  ASSERT_TRUE(credit.Take(Ack(0, 100)).ok());
  credit.Send(100);
  ASSERT_TRUE(credit.Take(Ack(30, 100)).ok());
  EXPECT_EQ(credit.left(), 30u);
  EXPECT_EQ(credit.received(), 30u);
}

TEST(PushCredit, TheLatestAcknowledgementCountsAlsoWhenItGrantsLess) {
  PushCredit credit(kHandle, kTotal);
  ASSERT_TRUE(credit.Take(Ack(0, 500)).ok());
  credit.Send(200);
  ASSERT_TRUE(credit.Take(Ack(0, 100)).ok());  // less than was sent
  EXPECT_EQ(credit.left(), 0u);
  EXPECT_FALSE(credit.Allows(1));
  ASSERT_TRUE(credit.Take(Ack(200, 50)).ok());
  EXPECT_EQ(credit.left(), 50u);
}

TEST(PushCredit, ItIsCompleteWhenEveryByteIsConfirmed) {
  PushCredit credit(kHandle, kTotal);
  ASSERT_TRUE(credit.Take(Ack(0, kHuge)).ok());
  credit.Send(kTotal);
  ASSERT_TRUE(credit.Take(Ack(kTotal - 1, 0)).ok());
  EXPECT_FALSE(credit.complete());
  ASSERT_TRUE(credit.Take(Ack(kTotal, kHuge)).ok());
  EXPECT_TRUE(credit.complete());
}

TEST(PushCredit, TheLargestCreditDoesNotOverflow) {
  PushCredit credit(kHandle, kHuge);
  ASSERT_TRUE(credit.Take(Ack(0, kHuge)).ok());
  credit.Send(kHuge - 10);
  ASSERT_TRUE(credit.Take(Ack(kHuge - 10, kHuge)).ok());
  EXPECT_EQ(credit.left(), 10u);
}

struct LieCase {
  std::string name;
  v1::KvAck ack;  // after 100 bytes were sent and 50 confirmed
  std::string message;
};

class LieSpec : public testing::TestWithParam<LieCase> {};

TEST_P(LieSpec, IsRefusedByFieldValueAndLimitAndChangesNothing) {
  PushCredit credit(kHandle, kTotal);
  ASSERT_TRUE(credit.Take(Ack(0, 200)).ok());
  credit.Send(100);
  ASSERT_TRUE(credit.Take(Ack(50, 200)).ok());
  const absl::Status status = credit.Take(GetParam().ack);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), GetParam().message);
  EXPECT_EQ(credit.received(), 50u);
  EXPECT_EQ(credit.left(), 150u);
}

INSTANTIATE_TEST_SUITE_P(
    Lies, LieSpec,
    testing::Values(
        LieCase{"another_handle", Ack(60, 200, std::string(32, '0')),
                "the handle of its acknowledgement is not the transfer_id of this "
                "push"},
        LieCase{"no_handle", Ack(60, 200, ""),
                "the handle of its acknowledgement is not the transfer_id of this "
                "push"},
        LieCase{"more_than_was_sent", Ack(101, 200),
                "it acknowledged bytes_received 101, but only 100 were sent"},
        LieCase{"less_than_before", Ack(49, 200),
                "it acknowledged bytes_received 49 after 50"}),
    testing_support::CaseName());

// Random honest sinks: what was sent never exceeds what any order of rules allows.
TEST(PushCredit, NothingIsEverSentBeyondTheLatestGrant) {
  for (uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](uint64_t limit) { return random() % (limit + 1); };
    PushCredit credit(kHandle, kTotal);
    uint64_t granted = 0;
    for (int step = 0; step < 200; ++step) {
      if (below(1) == 0) {
        const uint64_t received =
            credit.received() + below(credit.sent() - credit.received());
        const uint64_t more = below(300);
        ASSERT_TRUE(credit.Take(Ack(received, more)).ok()) << "seed " << seed;
        granted = std::min(received + more, kTotal);
      } else {
        const uint64_t bytes = 1 + below(150);
        const bool allowed = credit.Allows(bytes);
        ASSERT_EQ(allowed, credit.sent() + bytes <= granted) << "seed " << seed;
        if (allowed) credit.Send(bytes);
      }
    }
  }
}

}  // namespace
}  // namespace pbs::server
