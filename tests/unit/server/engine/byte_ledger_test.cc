// Spec: server/engine/byte_ledger.h.
#include "server/engine/byte_ledger.h"

#include <gtest/gtest.h>

#include <thread>
#include <utility>
#include <vector>

namespace pbs::server {
namespace {

TEST(ByteLedger, ChargesUntilTheReservationEnds) {
  ByteLedger ledger(100);
  {
    const ByteReservation bytes = *ledger.Reserve(60);
    EXPECT_EQ(bytes.bytes(), 60);
    EXPECT_EQ(ledger.bytes_held(), 60);
  }
  EXPECT_EQ(ledger.bytes_held(), 0);
}

TEST(ByteLedger, WhatCouldNeverFitIsInvalid) {
  ByteLedger ledger(100);
  EXPECT_EQ(ledger.Reserve(101).status(),
            absl::InvalidArgumentError("the request needs 101 bytes of memory, more "
                                       "than memory_bytes_max 100"));
}

TEST(ByteLedger, WhatDoesNotFitNowSaysWhatIsFree) {
  ByteLedger ledger(100);
  const ByteReservation bytes = *ledger.Reserve(60);
  EXPECT_EQ(ledger.Reserve(41).status(),
            absl::ResourceExhaustedError("the request needs 41 bytes of memory; 40 of "
                                         "memory_bytes_max 100 are free"));
  EXPECT_EQ(ledger.bytes_held(), 60);
  EXPECT_TRUE(ledger.Reserve(40).ok());
}

TEST(ByteLedger, WhatIsWithheldCanNeverFit) {
  ByteLedger ledger(100);
  EXPECT_EQ(ledger.Withhold(101),
            absl::InvalidArgumentError(
                "101 bytes of memory are more than memory_bytes_max 100"));
  ASSERT_TRUE(ledger.Withhold(40).ok());
  EXPECT_EQ(ledger.bytes_max(), 60);
  EXPECT_EQ(ledger.bytes_held(), 0);
  EXPECT_EQ(ledger.Reserve(61).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(ledger.Reserve(60).ok());
}

TEST(ByteLedger, ZeroBytesAlwaysFit) {
  ByteLedger ledger(0);
  EXPECT_TRUE(ledger.Reserve(0).ok());
}

TEST(ByteReservation, MovesWithItsCharge) {
  ByteLedger ledger(100);
  ByteReservation first = *ledger.Reserve(30);
  ByteReservation second = *ledger.Reserve(20);
  second = std::move(first);
  EXPECT_EQ(ledger.bytes_held(), 30);
  EXPECT_EQ(second.bytes(), 30);
  EXPECT_EQ(first.bytes(), 0);  // NOLINT(bugprone-use-after-move): the promise
}

TEST(ByteReservation, ShrinksAndNeverTwice) {
  ByteLedger ledger(100);
  ByteReservation bytes = *ledger.Reserve(30);
  bytes.ShrinkTo(10);
  EXPECT_EQ(ledger.bytes_held(), 10);
  bytes.Reset();
  bytes.Reset();
  EXPECT_EQ(ledger.bytes_held(), 0);
}

TEST(ByteReservation, AnEmptyOneBelongsToNoLedger) {
  ByteReservation bytes;
  bytes.ShrinkTo(0);
  EXPECT_EQ(bytes.bytes(), 0);
}

TEST(ByteLedger, CountsFromManyThreads) {
  ByteLedger ledger(1000);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&ledger] {
      for (int i = 0; i < 1000; ++i) {
        const ByteReservation bytes = *ledger.Reserve(250);
        EXPECT_LE(ledger.bytes_held(), 1000);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(ledger.bytes_held(), 0);
}

}  // namespace
}  // namespace pbs::server
