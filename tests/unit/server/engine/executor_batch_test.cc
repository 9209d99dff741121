// Spec: jobs that run as one (server/engine/executor.h, Job::RunWith). Steps are taken
// by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "tests/unit/server/engine/scripted_job.h"

namespace pbs::server {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::Not;
using testing_support::Events;
using testing_support::ScriptedJob;
using testing_support::SteppedExecutor;

struct Extras {
  int steps = 1;
  JobTerms terms = {};
  BatchKey key = {};
  bool runs_with_others = true;
  double predicted = 0;
  std::function<absl::Status(const RunControl&)> during_step = {};
};

class BatchSpec : public SteppedExecutor {
 protected:
  BatchSpec()
      : SteppedExecutor(
            {.queue_requests_max = 100, .yield_share = 0.25, .batch_tokens_max = 100}) {
  }

  JobId Submit(const char* name, int32_t tokens, Extras extras = {}) {
    auto job = std::make_unique<ScriptedJob>(name, extras.steps, events_);
    job->tokens = tokens;
    job->key = extras.key;
    job->runs_with_others = extras.runs_with_others;
    job->during_step = extras.during_step;
    JobSize size;
    size.prompt_tokens = tokens;
    size.num_steps = extras.steps;
    if (extras.predicted > 0) size.prediction = Prediction{extras.predicted, true};
    const auto admission = executor_.Submit(extras.terms, size, std::move(job));
    EXPECT_TRUE(admission.ok()) << admission.status();
    return admission->id;
  }
};

TEST_F(BatchSpec, WaitingJobsRunWithTheOneThatStarts) {
  Submit("a", 30, {.steps = 2});
  Submit("b", 30, {.steps = 2});
  Submit("c", 30, {.steps = 2});
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a runs with b c", "a starts after 0",
                                   "b starts after 0", "c starts after 0", "a steps",
                                   "a steps", "a OK", "b OK", "c OK"));
  EXPECT_EQ(metrics_.running.Value(), 0);
}

// Jobs of a run are one where another one steps, whoever of them has left.
TEST_F(BatchSpec, ARunIsSetAsideOnceByWhoeverIsLeftOfIt) {
  std::vector<JobId> ids;
  for (const char* name : {"a", "b", "c"}) {
    auto job = std::make_unique<ScriptedJob>(name, 4, events_);
    job->tokens = 30;
    job->on_set_aside = [this, name] {
      events_.push_back(std::string(name) + " is set aside");
    };
    ids.push_back(
        executor_.Submit({}, {.prediction = {}, .num_steps = 4}, std::move(job))->id);
  }
  executor_.RunOneStep();
  executor_.Cancel(ids[0]);
  executor_.RunOneStep();
  events_.clear();
  Submit("urgent", 30, {.terms = {.priority = 1}});
  RunAll();
  EXPECT_THAT(events_, ElementsAre("b is set aside", "urgent starts after 0",
                                   "urgent steps", "urgent OK", "b steps", "b steps",
                                   "b steps", "b OK", "c OK"));
}

TEST_F(BatchSpec, WhoComesLaterWaitsForTheNextRun) {
  Submit("a", 30, {.steps = 2});
  executor_.RunOneStep();
  Submit("b", 30);
  Submit("c", 30);
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a starts after 0", "a steps", "a steps", "a OK",
                                   "b runs with c", "b starts after 0",
                                   "c starts after 0", "b steps", "b OK", "c OK"));
}

TEST_F(BatchSpec, OnlyWhoFitsAndIsAlikeComesAlong) {
  const int other_model = 0;
  Submit("a", 40);
  Submit("fits", 60);
  Submit("long", 0);
  Submit("too many", 61);
  Submit("other", 20, {.key = {.model = &other_model}});
  Submit("urgent", 20, {.terms = {.priority = -1}});
  Submit("late", 20, {.terms = {.deadline = clock_.Now() + absl::Seconds(1)}});
  clock_.Advance(absl::Seconds(2));
  RunAll();
  EXPECT_THAT(events_, Contains("a runs with fits"));
  EXPECT_THAT(events_, Contains("late DeadlineExceeded").Times(0));
  EXPECT_THAT(events_, Contains("late DEADLINE_EXCEEDED"));
  EXPECT_THAT(events_, Contains("too many steps"));
  EXPECT_THAT(events_, Contains("other steps"));
  EXPECT_THAT(events_, Contains("urgent steps"));
}

TEST_F(BatchSpec, NobodyIsOvertakenWithoutPatience) {
  Submit("a", 40);
  Submit("too many", 61);
  Submit("would fit", 10);
  RunAll();
  EXPECT_THAT(events_, Contains("too many runs with would fit"));
  EXPECT_EQ(events_[0], "a starts after 0");
}

TEST_F(BatchSpec, WhoCannotBeJoinedRunsAlone) {
  Submit("a", 30, {.runs_with_others = false});
  Submit("b", 30);
  RunAll();
  EXPECT_THAT(events_, ElementsAre("a runs with b? no", "a starts after 0", "a steps",
                                   "a OK", "b starts after 0", "b steps", "b OK"));
}

TEST_F(BatchSpec, OneThatIsCancelledLeavesAndTheOthersGoOn) {
  for (const char* cancelled : {"a", "b"}) {
    events_.clear();
    const JobId a = Submit("a", 30, {.steps = 2});
    const JobId b = Submit("b", 30, {.steps = 2});
    Submit("c", 30, {.steps = 2});
    executor_.RunOneStep();
    executor_.Cancel(cancelled == std::string("a") ? a : b);
    RunAll();
    EXPECT_THAT(events_, Contains(std::string(cancelled) + " CANCELLED")) << cancelled;
    EXPECT_EQ(events_[4], "a steps");
    EXPECT_EQ(events_[5], std::string(cancelled) + " CANCELLED");
    EXPECT_EQ(events_.back(), "c OK");
    EXPECT_THAT(events_, Contains(testing::EndsWith(" OK")).Times(2));
  }
}

TEST_F(BatchSpec, ALeaderThatIsCancelledLeavesNoGapForALessImportantJob) {
  const JobId a = Submit("a", 30, {.steps = 2, .terms = {.priority = 1}});
  Submit("b", 30, {.steps = 2, .terms = {.priority = 1}});
  executor_.RunOneStep();
  Submit("less important", 0);
  executor_.Cancel(a);
  executor_.RunOneStep();
  EXPECT_EQ(events_.back(), "b steps");
  RunAll();
}

TEST_F(BatchSpec, OneThatIsCancelledWhileItIsJoinedInVainEndsAtOnce) {
  JobId b = 0;
  auto job = std::make_unique<ScriptedJob>("a", 1, events_);
  job->tokens = 30;
  job->runs_with_others = false;
  job->during_join = [&] { executor_.Cancel(b); };
  ASSERT_TRUE(executor_.Submit({}, {}, std::move(job)).ok());
  b = Submit("b", 30);
  executor_.RunOneStep();
  EXPECT_THAT(events_, ElementsAre("a runs with b? no", "b CANCELLED",
                                   "a starts after 0", "a steps", "a OK"));
  EXPECT_FALSE(executor_.RunOneStep());
}

TEST_F(BatchSpec, OneThatIsCancelledInAStepDoesNotStopIt) {
  JobId b = 0;
  bool has_stop = true;
  Submit("a", 30, {.during_step = [&](const RunControl& control) {
           executor_.Cancel(b);
           has_stop = control.stop != nullptr;
           return absl::OkStatus();
         }});
  b = Submit("b", 30);
  RunAll();
  EXPECT_FALSE(has_stop);
  EXPECT_THAT(events_, Contains("a OK"));
  EXPECT_THAT(events_, Contains("b CANCELLED"));
}

TEST_F(BatchSpec, AnErrorIsEveryonesAndTheWasteIsCounted) {
  Submit("a", 30, {.steps = 2, .during_step = [run = 0](const RunControl&) mutable {
                     return ++run == 2 ? absl::InternalError("broken")
                                       : absl::OkStatus();
                   }});
  Submit("b", 30, {.steps = 2});
  RunAll();
  EXPECT_THAT(events_, Contains("a INTERNAL"));
  EXPECT_THAT(events_, Contains("b INTERNAL"));
  EXPECT_EQ(metrics_.TokensWasted(WasteReason::kError).Value(), 30);  // half of each
}

TEST_F(BatchSpec, AMoreImportantJobOvertakesABatchBetweenSteps) {
  Submit("a", 30, {.steps = 2});
  Submit("b", 30, {.steps = 2});
  executor_.RunOneStep();
  Submit("urgent", 0, {.terms = {.priority = 1}});
  executor_.RunOneStep();
  EXPECT_EQ(events_.back(), "urgent OK");
  RunAll();
  EXPECT_EQ(events_.back(), "b OK");
}

TEST_F(BatchSpec, ALongJobYieldsToShortOnesThatRunAsOne) {
  Submit("long", 0, {.steps = 4, .predicted = 40});  // patience 10 s
  executor_.RunOneStep();
  Submit("a", 10, {.predicted = 4});
  Submit("b", 10, {.predicted = 4});
  Submit("c", 10, {.predicted = 4});
  RunAll();
  const auto begin = std::find(events_.begin(), events_.end(), "a runs with b");
  ASSERT_NE(begin, events_.end()) << "12 s are more than 10";
  EXPECT_LT(begin, std::find(events_.begin(), events_.end(), "long OK"));
  EXPECT_THAT(events_, Not(Contains("a runs with b c")));
}

TEST_F(BatchSpec, ShutdownEndsEveryone) {
  Submit("a", 30, {.steps = 3});
  Submit("b", 30, {.steps = 3});
  executor_.RunOneStep();
  Submit("c", 30);
  EXPECT_EQ(executor_.Shutdown(), 3);
  RunAll();
  EXPECT_THAT(events_, Contains(testing::EndsWith("UNAVAILABLE")).Times(3));
}

}  // namespace
}  // namespace pbs::server
