// Spec: server/base/timers.h.
#include "server/base/timers.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <string>
#include <vector>

namespace pbs::server {
namespace {

using testing::ElementsAre;

class TimerQueueSpec : public testing::Test {
 protected:
  TimerId At(absl::Duration ahead, const char* name) {
    return timers_.At(clock_.Now() + ahead, [this, name] { ran_.emplace_back(name); });
  }

  ManualClock clock_;
  TimerQueue timers_{clock_};
  std::vector<std::string> ran_;
};

TEST_F(TimerQueueSpec, RunsNothingBeforeItsTime) {
  At(absl::Seconds(1), "a");
  clock_.Advance(absl::Milliseconds(999));
  EXPECT_EQ(timers_.RunDue(), 0);
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_EQ(timers_.RunDue(), 1);
  EXPECT_THAT(ran_, ElementsAre("a"));
}

TEST_F(TimerQueueSpec, RunsEarliestFirstAndTiesInOrderOfArrival) {
  At(absl::Seconds(2), "late");
  At(absl::Seconds(1), "first");
  At(absl::Seconds(1), "second");
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(timers_.RunDue(), 3);
  EXPECT_THAT(ran_, ElementsAre("first", "second", "late"));
}

TEST_F(TimerQueueSpec, RunsEachCallbackOnce) {
  At(absl::ZeroDuration(), "a");
  EXPECT_EQ(timers_.RunDue(), 1);
  EXPECT_EQ(timers_.RunDue(), 0);
}

TEST_F(TimerQueueSpec, ACancelledTimerNeverRuns) {
  const TimerId id = At(absl::Seconds(1), "a");
  EXPECT_TRUE(timers_.Cancel(id));
  EXPECT_FALSE(timers_.Cancel(id));
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(timers_.RunDue(), 0);
}

TEST_F(TimerQueueSpec, CancellingATimerThatRanSaysSo) {
  const TimerId id = At(absl::ZeroDuration(), "a");
  timers_.RunDue();
  EXPECT_FALSE(timers_.Cancel(id));
}

TEST_F(TimerQueueSpec, UnknownIdsAreNotCancelled) {
  EXPECT_FALSE(timers_.Cancel(0));
  EXPECT_FALSE(timers_.Cancel(42));
}

TEST_F(TimerQueueSpec, CancellingFreesWhatTheCallbackHeld) {
  auto held = std::make_shared<int>(1);
  const TimerId id =
      timers_.At(clock_.Now() + absl::Seconds(1), [copy = held] { (void)copy; });
  EXPECT_EQ(held.use_count(), 2);
  timers_.Cancel(id);
  EXPECT_EQ(held.use_count(), 1);
}

TEST_F(TimerQueueSpec, ACallbackMayAddAndCancelTimers) {
  const TimerId doomed = At(absl::Seconds(1), "doomed");
  timers_.At(clock_.Now(), [this, doomed] {
    timers_.Cancel(doomed);
    At(absl::ZeroDuration(), "added");
  });
  EXPECT_EQ(timers_.RunDue(), 2);
  clock_.Advance(absl::Seconds(1));
  timers_.RunDue();
  EXPECT_THAT(ran_, ElementsAre("added"));
}

TEST_F(TimerQueueSpec, TheInfiniteFutureNeverComes) {
  EXPECT_EQ(timers_.At(absl::InfiniteFuture(), [] {}), 0u);
  EXPECT_EQ(timers_.NextTime(), absl::InfiniteFuture());
}

TEST_F(TimerQueueSpec, SaysWhenTheNextTimerIsDue) {
  At(absl::Seconds(5), "b");
  At(absl::Seconds(3), "a");
  EXPECT_EQ(timers_.NextTime(), clock_.Now() + absl::Seconds(3));
}

TEST(TimerThreadSpec, RunsATimerAddedWhileItWaitsForALaterOne) {
  const RealClock clock;
  TimerQueue timers(clock);
  TimerThread thread(timers);
  timers.At(clock.Now() + absl::Hours(24), [] { FAIL() << "a day early"; });
  std::promise<void> ran;
  timers.At(clock.Now(), [&ran] { ran.set_value(); });
  ran.get_future().wait();
}

TEST(TimerThreadSpec, StopsWithTimersPending) {
  const RealClock clock;
  TimerQueue timers(clock);
  timers.At(clock.Now() + absl::Hours(24), [] { FAIL() << "a day early"; });
  { TimerThread thread(timers); }
  EXPECT_NE(timers.NextTime(), absl::InfiniteFuture());
}

}  // namespace
}  // namespace pbs::server
