// Spec: server/base/clock.h.
#include "server/base/clock.h"

#include <gtest/gtest.h>
#include <chrono>

#include "absl/time/clock.h"

namespace pbs::server {
namespace {

TEST(ManualClock, StandsStillUntilAdvanced) {
  ManualClock clock(absl::FromUnixSeconds(100));
  EXPECT_EQ(clock.Now(), absl::FromUnixSeconds(100));
  clock.Advance(absl::Milliseconds(1500));
  EXPECT_EQ(clock.Now(), absl::FromUnixMillis(101'500));
}

TEST(RealClock, AgreesWithTheSystemAndNeverGoesBack) {
  const absl::Time before = absl::Now();
  const RealClock clock;
  const absl::Time first = clock.Now();
  const absl::Time second = clock.Now();
  EXPECT_GE(first, before);
  EXPECT_GE(second, first);
}

TEST(Clock, ASystemDeadlineKeepsItsDistance) {
  const ManualClock clock(absl::FromUnixSeconds(100));
  const auto deadline = std::chrono::system_clock::now() + std::chrono::hours(1);
  const absl::Duration ahead = clock.FromSystem(deadline) - clock.Now();
  EXPECT_LE(ahead, absl::Hours(1));
  EXPECT_GT(ahead, absl::Minutes(59));
}

TEST(Clock, NoSystemDeadlineIsTheInfiniteFuture) {
  const ManualClock clock;
  EXPECT_EQ(clock.FromSystem(std::chrono::system_clock::time_point::max()),
            absl::InfiniteFuture());
}

}  // namespace
}  // namespace pbs::server
