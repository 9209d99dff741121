// Spec: server/engine/executor.h. Jobs are scripted and steps are taken by hand, so
// that every order of events can be written down; executor_threads_test.cc has threads.
#include "server/engine/executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/unit/server/engine/scripted_job.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing_support::Events;
using testing_support::ScriptedJob;

class ExecutorSpec : public testing::Test {
 protected:
  std::unique_ptr<ScriptedJob> MakeJob(const char* name, int steps = 1) {
    auto job = std::make_unique<ScriptedJob>(name, steps, events_);
    job->last_message = &last_message_;
    return job;
  }
  absl::StatusOr<Admission> Submit(const char* name, int steps = 1, JobTerms terms = {},
                                   JobSize size = {}) {
    return executor_.Submit(terms, size, MakeJob(name, steps));
  }
  void RunAll() {
    while (executor_.RunOneStep()) {
    }
  }
  JobTerms DeadlineIn(absl::Duration duration) const {
    return {.deadline = clock_.Now() + duration};
  }
  static JobSize Predicted(double seconds, bool fresh = true, int32_t num_steps = 1) {
    return {.prompt_tokens = 100,
            .prediction = Prediction{seconds, fresh},
            .num_steps = num_steps};
  }
  static double Value(prometheus::Counter& counter) { return counter.Value(); }

  static constexpr int32_t kQueueMax = 3;

  ManualClock clock_;
  TimerQueue timers_{clock_};
  prometheus::Registry registry_;
  EngineMetrics metrics_{registry_};
  Events events_;
  std::string last_message_;
  Executor executor_{{.queue_requests_max = kQueueMax}, clock_, timers_, metrics_};
};

// ---- running

TEST_F(ExecutorSpec, RunsAJobStepByStepAndFinishesItOnce) {
  ASSERT_TRUE(Submit("a", 2).ok());
  EXPECT_TRUE(executor_.RunOneStep());
  EXPECT_TRUE(executor_.RunOneStep());
  EXPECT_FALSE(executor_.RunOneStep());
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a steps", "a OK"));
}

TEST_F(ExecutorSpec, RunsEqualJobsInOrderOfArrivalEachToItsEnd) {
  ASSERT_TRUE(Submit("a", 2).ok());
  ASSERT_TRUE(Submit("b").ok());
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a steps", "a OK",
                                   "b starts after 0", "b steps", "b OK"));
}

TEST_F(ExecutorSpec, AMoreImportantJobOvertakesBetweenTwoSteps) {
  ASSERT_TRUE(Submit("long", 2).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(Submit("urgent", 1, {.priority = 5}).ok());
  RunAll();
  EXPECT_THAT(events_,
              ElementsAre("long starts after 0", "long steps", "urgent starts after 0",
                          "urgent steps", "urgent OK", "long steps", "long OK"));
}

TEST_F(ExecutorSpec, AFailedStepEndsTheJobWithItsStatus) {
  auto job = MakeJob("a", 3);
  job->during_step = [](const RunControl&) { return absl::InternalError("broken"); };
  ASSERT_TRUE(executor_.Submit({}, {}, std::move(job)).ok());
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a INTERNAL"));
  EXPECT_EQ(last_message_, "broken");
}

TEST_F(ExecutorSpec, TellsAJobHowLongItWaited) {
  ASSERT_TRUE(Submit("a").ok());
  clock_.Advance(absl::Seconds(3));
  RunAll();
  EXPECT_EQ(events_.front(), "a starts after 3s");
}

// ---- admission

TEST_F(ExecutorSpec, CountsTheJobsAhead) {
  EXPECT_EQ(Submit("a", 2)->queue_position, 0);
  executor_.RunOneStep();
  EXPECT_EQ(Submit("b")->queue_position, 1);
  EXPECT_EQ(Submit("low", 1, {.priority = -1})->queue_position, 2);
  EXPECT_EQ(Submit("high", 1, {.priority = 1})->queue_position, 1);  // the started one
}

TEST_F(ExecutorSpec, IdsAreNeverZeroAndDiffer) {
  const JobId first = Submit("a")->id;
  const JobId second = Submit("b")->id;
  EXPECT_NE(first, 0u);
  EXPECT_NE(first, second);
}

TEST_F(ExecutorSpec, PredictsWhatIsLeftOfTheJobsAheadAndTheJobItself) {
  EXPECT_EQ(Submit("a", 4, {}, Predicted(8))->predicted_seconds, 8);
  executor_.RunOneStep();  // a quarter done
  EXPECT_EQ(Submit("b", 1, {}, Predicted(1))->predicted_seconds, 7);
}

TEST_F(ExecutorSpec, AnUrgentJobIsPredictedToOvertakeWhatIsLessImportant) {
  ASSERT_TRUE(Submit("long", 4, {}, Predicted(8, true, 4)).ok());
  executor_.RunOneStep();  // started, and between two steps now
  ASSERT_TRUE(Submit("waiting", 1, {}, Predicted(3)).ok());
  ASSERT_TRUE(Submit("important", 1, {.priority = 5}, Predicted(0.5)).ok());
  EXPECT_EQ(Submit("urgent", 1, {.priority = 5}, Predicted(1))->predicted_seconds, 1.5);
}

// The step that runs ends first; the rest of its job does not.
TEST_F(ExecutorSpec, AnUrgentJobWaitsForOneStepOfALessImportantOneAtMost) {
  auto job = MakeJob("long", 4);
  std::vector<double> predicted;
  job->during_step = [&](const RunControl&) {
    JobTerms urgent = DeadlineIn(absl::Seconds(3));
    urgent.priority = 5;
    const auto admission = executor_.Submit(urgent, Predicted(1), MakeJob("urgent"));
    if (admission.ok()) predicted.push_back(admission->predicted_seconds);
    return admission.status();
  };
  ASSERT_TRUE(executor_.Submit({}, Predicted(8, true, 4), std::move(job)).ok());
  executor_.RunOneStep();
  EXPECT_THAT(predicted, ElementsAre(3));  // two for the step, one for itself
  executor_.RunOneStep();
  EXPECT_EQ(events_.back(), "urgent OK");
}

TEST_F(ExecutorSpec, AnUrgentJobThatCannotMeetItsDeadlineBehindAStepIsRefused) {
  auto job = MakeJob("long", 4);
  absl::Status refused;
  job->during_step = [&](const RunControl&) {
    JobTerms urgent = DeadlineIn(absl::Seconds(2));
    urgent.priority = 5;
    refused = executor_.Submit(urgent, Predicted(1), MakeJob("urgent")).status();
    return absl::OkStatus();
  };
  ASSERT_TRUE(executor_.Submit({}, Predicted(8, true, 4), std::move(job)).ok());
  executor_.RunOneStep();
  EXPECT_EQ(refused,
            absl::DeadlineExceededError(
                "the deadline in 2 s cannot be met: the request would be done in 3 s, "
                "with 1 ahead of it"));
}

TEST_F(ExecutorSpec, PredictsNothingForAJobWithoutAnEstimate) {
  ASSERT_TRUE(Submit("a", 1, {}, Predicted(8)).ok());
  EXPECT_EQ(Submit("b")->predicted_seconds, 0);
}

TEST_F(ExecutorSpec, AFullQueueRefuses) {
  for (int i = 0; i < kQueueMax; ++i) ASSERT_TRUE(Submit("a").ok());
  EXPECT_EQ(Submit("late").status(),
            absl::ResourceExhaustedError(
                "the queue has 3 waiting requests; queue_requests_max is 3"));
  EXPECT_EQ(Value(metrics_.Rejected(RejectReason::kQueueFull)), 1);
}

TEST_F(ExecutorSpec, AStartedJobMakesRoomInTheQueue) {
  ASSERT_TRUE(Submit("a", 2).ok());
  executor_.RunOneStep();
  for (int i = 0; i < kQueueMax; ++i) EXPECT_TRUE(Submit("b").ok());
  EXPECT_FALSE(Submit("c").ok());
}

TEST_F(ExecutorSpec, APassedDeadlineRefuses) {
  EXPECT_EQ(Submit("a", 1, DeadlineIn(absl::ZeroDuration())).status(),
            absl::DeadlineExceededError("the deadline has passed"));
  EXPECT_EQ(Value(metrics_.Rejected(RejectReason::kDeadline)), 1);
}

TEST_F(ExecutorSpec, ADeadlineThatCannotBeMetRefuses) {
  ASSERT_TRUE(Submit("a", 1, {}, Predicted(4)).ok());
  EXPECT_EQ(Submit("b", 1, DeadlineIn(absl::Seconds(3)), Predicted(1)).status(),
            absl::DeadlineExceededError(
                "the deadline in 3 s cannot be met: the request would be done in 5 s, "
                "with 1 ahead of it"));
}

TEST_F(ExecutorSpec, APredictionThatIsALittleTooLongIsNotBelieved) {
  EXPECT_TRUE(Submit("a", 1, DeadlineIn(absl::Seconds(4)), Predicted(5)).ok());
  EXPECT_FALSE(Submit("b", 1, DeadlineIn(absl::Seconds(4)), Predicted(5.1)).ok());
}

TEST_F(ExecutorSpec, AStalePredictionRefusesNobody) {
  EXPECT_TRUE(
      Submit("a", 1, DeadlineIn(absl::Seconds(1)), Predicted(100, /*fresh=*/false))
          .ok());
}

TEST_F(ExecutorSpec, ARefusedJobIsNeverFinished) {
  ASSERT_FALSE(Submit("a", 1, DeadlineIn(absl::ZeroDuration())).ok());
  RunAll();
  EXPECT_THAT(events_, IsEmpty());
}

// ---- cancellation

TEST_F(ExecutorSpec, CancellingAWaitingJobEndsItAtOnce) {
  ASSERT_TRUE(Submit("a", 2).ok());
  executor_.RunOneStep();
  const JobId id = Submit("b")->id;
  events_.clear();
  executor_.Cancel(id);
  EXPECT_THAT(events_, ElementsAre("b CANCELLED"));
  executor_.Cancel(id);
  RunAll();
  EXPECT_THAT(events_, ElementsAre("b CANCELLED", "a steps", "a OK"));
}

TEST_F(ExecutorSpec, CancellingAStartedJobEndsItBeforeItsNextStep) {
  const JobId id = Submit("a", 3)->id;
  executor_.RunOneStep();
  executor_.Cancel(id);
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a CANCELLED"));
  EXPECT_EQ(last_message_, "the request was cancelled");
}

TEST_F(ExecutorSpec, CancellingInsideAStepRaisesItsStopFlag) {
  auto job = MakeJob("a", 2);
  JobId id = 0;
  bool stopped = false;
  job->during_step = [&](const RunControl& control) {
    executor_.Cancel(id);
    stopped = control.stop->load();
    return absl::CancelledError("stopped inside");
  };
  id = executor_.Submit({}, {}, std::move(job))->id;
  RunAll();
  EXPECT_TRUE(stopped);
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a CANCELLED"));
}

TEST_F(ExecutorSpec, CancellingInTheLastStepStillCancels) {
  auto job = MakeJob("a", 1);
  JobId id = 0;
  job->during_step = [&](const RunControl&) {
    executor_.Cancel(id);
    return absl::OkStatus();
  };
  id = executor_.Submit({}, {}, std::move(job))->id;
  RunAll();
  EXPECT_EQ(events_.back(), "a CANCELLED");
}

TEST_F(ExecutorSpec, CancellingAnOvertakenJobEndsIt) {
  const JobId id = Submit("long", 2)->id;
  executor_.RunOneStep();
  ASSERT_TRUE(Submit("urgent", 2, {.priority = 5}).ok());
  executor_.RunOneStep();
  executor_.Cancel(id);
  events_.clear();
  executor_.RunOneStep();
  EXPECT_THAT(events_, ElementsAre("long CANCELLED", "urgent steps", "urgent OK"));
}

TEST_F(ExecutorSpec, CancellingAFinishedOrUnknownJobDoesNothing) {
  const JobId id = Submit("a")->id;
  RunAll();
  executor_.Cancel(id);
  executor_.Cancel(12345);
  EXPECT_EQ(events_.back(), "a OK");
}

TEST_F(ExecutorSpec, CancellingAfterTheDeadlineSaysDeadline) {
  const JobId id = Submit("a", 1, DeadlineIn(absl::Seconds(1)))->id;
  clock_.Advance(absl::Seconds(1));
  executor_.Cancel(id);
  EXPECT_THAT(events_, ElementsAre("a DEADLINE_EXCEEDED"));
}

// ---- deadlines

TEST_F(ExecutorSpec, AWaitingJobEndsWhenItsDeadlineComes) {
  ASSERT_TRUE(Submit("a", 1, DeadlineIn(absl::Seconds(1))).ok());
  clock_.Advance(absl::Seconds(1));
  timers_.RunDue();
  EXPECT_THAT(events_, ElementsAre("a DEADLINE_EXCEEDED"));
  EXPECT_EQ(last_message_, "the deadline passed while the request waited");
  EXPECT_EQ(Value(metrics_.Rejected(RejectReason::kDeadline)), 1);
}

TEST_F(ExecutorSpec, ADeadlineIsSeenOnDequeueEvenIfItsTimerIsLate) {
  ASSERT_TRUE(Submit("a", 1, DeadlineIn(absl::Seconds(1))).ok());
  clock_.Advance(absl::Seconds(2));
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a DEADLINE_EXCEEDED"));
}

TEST_F(ExecutorSpec, ADeadlineBetweenTwoStepsEndsTheJob) {
  ASSERT_TRUE(Submit("a", 2, DeadlineIn(absl::Seconds(1))).ok());
  executor_.RunOneStep();
  clock_.Advance(absl::Seconds(1));
  RunAll();
  EXPECT_THAT(events_,
              ElementsAre("a starts after 0", "a steps", "a DEADLINE_EXCEEDED"));
  EXPECT_EQ(last_message_, "the deadline passed while the request ran");
}

TEST_F(ExecutorSpec, ADeadlineInsideAStepRaisesItsStopFlag) {
  auto job = MakeJob("a", 2);
  bool stopped = false;
  job->during_step = [&](const RunControl& control) {
    clock_.Advance(absl::Seconds(1));
    timers_.RunDue();
    stopped = control.stop->load();
    return absl::CancelledError("stopped inside");
  };
  ASSERT_TRUE(executor_.Submit(DeadlineIn(absl::Seconds(1)), {}, std::move(job)).ok());
  RunAll();
  EXPECT_TRUE(stopped);
  EXPECT_EQ(events_.back(), "a DEADLINE_EXCEEDED");
}

TEST_F(ExecutorSpec, AFinishedJobLeavesNoTimerBehind) {
  ASSERT_TRUE(Submit("a", 1, DeadlineIn(absl::Seconds(1))).ok());
  RunAll();
  EXPECT_EQ(timers_.NextTime(), absl::InfiniteFuture());
}

// ---- drain and shutdown

TEST_F(ExecutorSpec, DrainOfAnIdleExecutorIsIdleAtOnce) {
  int idle = 0;
  executor_.Drain([&] { ++idle; });
  EXPECT_EQ(idle, 1);
}

TEST_F(ExecutorSpec, DrainRefusesNewWorkAndWaitsForWhatWasAdmitted) {
  ASSERT_TRUE(Submit("a", 2).ok());
  ASSERT_TRUE(Submit("b").ok());
  executor_.Drain([&] { events_.emplace_back("idle"); });
  EXPECT_EQ(Submit("c").status(), absl::UnavailableError("the server is draining"));
  EXPECT_EQ(Value(metrics_.Rejected(RejectReason::kDraining)), 1);
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a steps", "a OK",
                                   "b starts after 0", "b steps", "b OK", "idle"));
}

TEST_F(ExecutorSpec, ShutdownEndsWaitingAndStartedJobs) {
  ASSERT_TRUE(Submit("a", 2).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(Submit("b").ok());
  EXPECT_EQ(executor_.Shutdown(), 2);
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "b UNAVAILABLE",
                                   "a UNAVAILABLE"));
}

TEST_F(ExecutorSpec, ShutdownCutsNothingThatHasEndedOrWasCancelled) {
  ASSERT_TRUE(Submit("done").ok());
  RunAll();
  const JobId id = Submit("a", 2)->id;
  executor_.RunOneStep();
  executor_.Cancel(id);
  EXPECT_EQ(executor_.Shutdown(), 0);
  RunAll();
  EXPECT_EQ(events_.back(), "a CANCELLED");
}

TEST_F(ExecutorSpec, DestructionFinishesEveryJob) {
  {
    Executor executor({.queue_requests_max = kQueueMax}, clock_, timers_, metrics_);
    ASSERT_TRUE(executor.Submit({}, {}, MakeJob("a")).ok());
  }
  EXPECT_THAT(events_, ElementsAre("a UNAVAILABLE"));
}

// ---- metrics

TEST_F(ExecutorSpec, GaugesFollowTheQueue) {
  ASSERT_TRUE(Submit("a", 2, {}, Predicted(4)).ok());
  ASSERT_TRUE(Submit("b", 1, {}, Predicted(1)).ok());
  EXPECT_EQ(metrics_.waiting.Value(), 2);
  EXPECT_EQ(metrics_.backlog_tokens.Value(), 200);
  EXPECT_EQ(metrics_.backlog_seconds.Value(), 5);
  executor_.RunOneStep();
  EXPECT_EQ(metrics_.waiting.Value(), 1);
  EXPECT_EQ(metrics_.running.Value(), 1);
  EXPECT_EQ(metrics_.backlog_seconds.Value(), 3);
  RunAll();
  EXPECT_EQ(metrics_.waiting.Value(), 0);
  EXPECT_EQ(metrics_.running.Value(), 0);
  EXPECT_EQ(metrics_.backlog_tokens.Value(), 0);
  EXPECT_EQ(metrics_.backlog_seconds.Value(), 0);
}

TEST_F(ExecutorSpec, ThrownAwayWorkIsCountedByItsReason) {
  const JobId cancelled = Submit("a", 4, {}, Predicted(1))->id;
  executor_.RunOneStep();
  executor_.Cancel(cancelled);
  RunAll();
  EXPECT_EQ(Value(metrics_.TokensWasted(WasteReason::kCancelled)), 25);

  ASSERT_TRUE(Submit("b", 2, DeadlineIn(absl::Seconds(9)), Predicted(1)).ok());
  executor_.RunOneStep();
  clock_.Advance(absl::Seconds(9));
  RunAll();
  EXPECT_EQ(Value(metrics_.TokensWasted(WasteReason::kDeadline)), 50);
}

TEST_F(ExecutorSpec, AShutdownIsNoCancellation) {
  ASSERT_TRUE(Submit("a", 4, {}, Predicted(1)).ok());
  executor_.RunOneStep();
  executor_.Shutdown();
  RunAll();
  EXPECT_EQ(Value(metrics_.TokensWasted(WasteReason::kShutdown)), 25);
  EXPECT_EQ(Value(metrics_.TokensWasted(WasteReason::kCancelled)), 0);
}

TEST_F(ExecutorSpec, ACallersClockThatIsAheadSaysDeadline) {
  const JobId id = Submit("a", 4, DeadlineIn(absl::Seconds(9)), Predicted(1))->id;
  executor_.RunOneStep();
  executor_.Cancel(id, CancelReason::kDeadline);
  RunAll();
  EXPECT_EQ(last_message_, "the deadline passed while the request ran");
  EXPECT_EQ(Value(metrics_.TokensWasted(WasteReason::kDeadline)), 25);
}

TEST_F(ExecutorSpec, TellsForHowLongNothingHasProgressed) {
  const auto age = [&] { return executor_.backlog().progress_age_seconds; };
  clock_.Advance(absl::Seconds(100));
  EXPECT_EQ(age(), 0) << "without work";
  ASSERT_TRUE(Submit("a", 2, {}, Predicted(1)).ok());
  clock_.Advance(absl::Seconds(3));
  EXPECT_EQ(age(), 3) << "since the work came";
  ASSERT_TRUE(Submit("b", 2, {}, Predicted(1)).ok());
  EXPECT_EQ(age(), 3) << "more work is no progress";
  executor_.RunOneStep();
  EXPECT_EQ(age(), 0) << "a step has ended";
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(age(), 2);
  RunAll();
  clock_.Advance(absl::Seconds(5));
  EXPECT_EQ(age(), 0) << "all is done";
}

TEST_F(ExecutorSpec, WorkThatWasUsedIsNotWasted) {
  ASSERT_TRUE(Submit("a", 2, {}, Predicted(1)).ok());
  RunAll();
  for (size_t reason = 0; reason < kWasteReasonNames.size(); ++reason) {
    EXPECT_EQ(Value(metrics_.TokensWasted(static_cast<WasteReason>(reason))), 0);
  }
}

}  // namespace
}  // namespace pbs::server
