// Spec: server/service/call_deadline.h and unread_calls.h.
#include "server/service/call_deadline.h"

#include <gtest/gtest.h>

#include "server/service/unread_calls.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

const absl::Time kBegin = absl::FromUnixSeconds(1'700'000'000);

struct DeadlineCase {
  const char* name;
  absl::Duration time;       // of the call
  absl::Duration remaining;  // when its caller ends it
  bool is_deadline;
};

class CallDeadlineSpec : public testing::TestWithParam<DeadlineCase> {};

TEST_P(CallDeadlineSpec, IsWhatEndsACallShortlyBeforeOrAfterIt) {
  const auto& [name, time, remaining, is_deadline] = GetParam();
  const CallDeadline deadline(kBegin, kBegin + time);
  EXPECT_EQ(deadline.time(), kBegin + time);
  EXPECT_EQ(deadline.Ends(kBegin + time - remaining), is_deadline);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CallDeadlineSpec,
    testing::Values(
        DeadlineCase{"at_it", absl::Seconds(10), absl::ZeroDuration(), true},
        DeadlineCase{"after_it", absl::Seconds(10), absl::Seconds(-5), true},
        DeadlineCase{"on_the_way_and_rounded", absl::Seconds(10),
                     absl::Milliseconds(200), true},
        DeadlineCase{"by_the_caller", absl::Seconds(10), absl::Milliseconds(201),
                     false},
        DeadlineCase{"at_the_begin", absl::Seconds(10), absl::Seconds(10), false},
        DeadlineCase{"late_in_a_long_call", absl::Minutes(30), absl::Seconds(18), true},
        DeadlineCase{"early_in_a_short_call", absl::Milliseconds(20),
                     absl::Milliseconds(11), false},
        DeadlineCase{"late_in_a_short_call", absl::Milliseconds(20),
                     absl::Milliseconds(10), true},
        DeadlineCase{"of_a_call_that_came_late", absl::Seconds(-1), absl::Seconds(-1),
                     true}),
    testing_support::CaseName());

TEST(CallDeadline, NoneNeverEndsACall) {
  EXPECT_FALSE(CallDeadline(kBegin, absl::InfiniteFuture()).Ends(kBegin));
}

TEST(UnreadCallsSpec, ACallCountsOnceItWasMissingForHalfAMinute) {
  UnreadCalls unread;
  for (int look = 1; look < UnreadCalls::kLooks; ++look) {
    EXPECT_EQ(unread.Look(5, 3), 0) << "look " << look;
  }
  EXPECT_EQ(unread.Look(5, 3), 2);
  EXPECT_EQ(unread.Look(9, 7), 0) << "they are known";
}

TEST(UnreadCallsSpec, ARequestOnItsWayDoesNotCount) {
  UnreadCalls unread;
  for (int look = 0; look < 100; ++look) {
    // Always one on its way, but never the same one for long.
    EXPECT_EQ(unread.Look(look + 1, look % 5 == 0 ? look + 1 : look), 0);
  }
}

}  // namespace
}  // namespace pbs::server
