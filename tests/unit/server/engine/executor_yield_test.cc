// Spec: how jobs of one priority yield to shorter ones (server/engine/executor.h,
// ExecutorOptions::yield_share). Steps are taken by hand, and each lasts as long as the
// test says on a clock of its own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/unit/server/engine/scripted_job.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing_support::Events;
using testing_support::ScriptedJob;
using testing_support::SteppedExecutor;

class YieldSpec : public SteppedExecutor {
 protected:
  YieldSpec() : SteppedExecutor({.queue_requests_max = 1000, .yield_share = 0.25}) {}

  // Of `steps` steps that take `seconds` together, and that is predicted.
  absl::StatusOr<Admission> Submit(const char* name, double seconds, int steps = 1,
                                   JobTerms terms = {}) {
    return SubmitPredicted(name, seconds, seconds, steps, terms);
  }
  absl::StatusOr<Admission> SubmitPredicted(const char* name, double predicted,
                                            double seconds, int steps,
                                            const JobTerms& terms = {}) {
    auto job = std::make_unique<ScriptedJob>(name, steps, events_);
    job->during_step = [this,
                        step = absl::Seconds(seconds / steps)](const RunControl&) {
      clock_.Advance(step);
      return absl::OkStatus();
    };
    const JobSize size = {.prompt_tokens = 100,
                          .prediction = Prediction{predicted, true},
                          .num_steps = steps};
    return executor_.Submit(terms, size, std::move(job));
  }
  // Of `events_`, the ends.
  std::vector<std::string> Ends() const {
    std::vector<std::string> ends;
    for (const std::string& event : events_) {
      if (event.ends_with(" OK")) ends.push_back(event.substr(0, event.size() - 3));
    }
    return ends;
  }
};

TEST_F(YieldSpec, AShortJobGoesBetweenTwoStepsOfALongOne) {
  ASSERT_TRUE(Submit("long", 8, 2).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(Submit("short", 1).ok());
  RunAll();
  EXPECT_THAT(events_,
              ElementsAre("long starts after 0", "long steps", "short starts after 0",
                          "short steps", "short OK", "long steps", "long OK"));
}

TEST_F(YieldSpec, WhatYieldsIsAShareOfTheJobsOwnTime) {
  ASSERT_TRUE(Submit("long", 8, 2).ok());  // patience 2 s
  executor_.RunOneStep();
  for (const char* name : {"a", "b", "c"}) ASSERT_TRUE(Submit(name, 1).ok());
  RunAll();
  EXPECT_THAT(Ends(), ElementsAre("a", "b", "long", "c"));
}

TEST_F(YieldSpec, AJobThatTakesLongerThanItSaidIsSetAside) {
  ASSERT_TRUE(Submit("long", 8, 2).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(SubmitPredicted("liar", 1, 20, 10).ok());  // 2 s a step
  RunAll();
  EXPECT_THAT(Ends(), ElementsAre("long", "liar"));
  EXPECT_EQ(
      std::count(events_.begin(), std::find(events_.begin(), events_.end(), "long OK"),
                 "liar steps"),
      1);
}

TEST_F(YieldSpec, ADeadlineThatWouldBeMissedForItIsNotYielded) {
  ASSERT_TRUE(
      Submit("long", 8, 2, {.deadline = clock_.Now() + absl::Seconds(8.5)}).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(Submit("short", 1).ok());
  RunAll();
  EXPECT_THAT(Ends(), ElementsAre("long", "short"));
}

TEST_F(YieldSpec, WhatRunsBeforeAJobCountsAgainstItsDeadline) {
  ASSERT_TRUE(Submit("running", 59, 59).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(
      Submit("due", 20, 1, {.deadline = clock_.Now() + absl::Seconds(81)}).ok());
  for (const char* name : {"a", "b", "c", "d"}) ASSERT_TRUE(Submit(name, 3).ok());
  RunAll();
  const std::vector<std::string> ends = Ends();
  ASSERT_EQ(ends.size(), 6u);
  EXPECT_THAT(ends, testing::Contains("due"));
}

TEST_F(YieldSpec, AdmissionKnowsWhoWillBeOvertaken) {
  ASSERT_TRUE(Submit("long", 80, 8).ok());
  ASSERT_TRUE(Submit("short", 2).ok());
  executor_.RunOneStep();  // the short one, to its end
  executor_.RunOneStep();
  const auto other =
      Submit("other short", 3, 1, {.deadline = clock_.Now() + absl::Seconds(20)});
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(other->predicted_seconds, 3);
  const auto longer = Submit("longer", 90, 8);
  EXPECT_EQ(longer->predicted_seconds, 70 + 3 + 90);
}

// Jobs whose host is a step ahead of their device, for which they are set aside.
class AheadSpec : public YieldSpec {
 protected:
  // A step takes a second; the last one called is under way until the next, or until
  // the job is set aside, waits for it.
  absl::StatusOr<Admission> SubmitAhead(const char* name, int steps,
                                        JobTerms terms = {}) {
    auto job = std::make_unique<ScriptedJob>(name, steps, events_);
    struct Steps {
      int called = 0;
      bool under_way = false;
    };
    const auto of = std::make_shared<Steps>();
    const auto wait = [this, of] {
      if (of->under_way) clock_.Advance(absl::Seconds(1));
      of->under_way = false;
    };
    job->during_step = [of, wait, steps](const RunControl&) {
      wait();
      of->under_way = true;
      if (++of->called == steps) wait();
      return absl::OkStatus();
    };
    job->on_set_aside = [this, wait, name] {
      wait();
      events_.push_back(std::string(name) + " is set aside");
    };
    const JobSize size = {.prompt_tokens = 100,
                          .prediction = Prediction{static_cast<double>(steps), true},
                          .num_steps = steps,
                          .steps_under_way = 2};
    return executor_.Submit(terms, size, std::move(job));
  }
};

TEST_F(AheadSpec, AJobIsSetAsideBeforeAnotherOneStepsAndOnlyThen) {
  ASSERT_TRUE(SubmitAhead("long", 8).ok());
  executor_.RunOneStep();
  executor_.RunOneStep();
  ASSERT_TRUE(SubmitAhead("short", 1).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(SubmitAhead("urgent", 2, {.priority = 1}).ok());
  executor_.RunOneStep();
  executor_.RunOneStep();
  executor_.RunOneStep();
  executor_.RunOneStep();
  EXPECT_THAT(events_,
              ElementsAre("long starts after 0", "long steps", "long steps",
                          "long is set aside", "short starts after 1s", "short steps",
                          "short OK", "urgent starts after 0", "urgent steps",
                          "urgent steps", "urgent OK", "long steps", "long steps"));
}

TEST_F(AheadSpec, AJobThatEndsWhileItIsAheadIsNotSetAside) {
  const auto id = SubmitAhead("long", 8)->id;
  executor_.RunOneStep();
  executor_.Cancel(id);
  ASSERT_TRUE(SubmitAhead("short", 1).ok());
  RunAll();
  EXPECT_THAT(events_,
              ElementsAre("long starts after 0", "long steps", "long CANCELLED",
                          "short starts after 0", "short steps", "short OK"));
}

// What is under way when it is set aside is the job's own, which delays others.
TEST_F(AheadSpec, TheTimeInWhichAJobIsSetAsideIsCharged) {
  ASSERT_TRUE(SubmitAhead("first", 8).ok());  // patience 2 s
  executor_.RunOneStep();
  // Overtakes for all of a second, set aside included, and then no more.
  ASSERT_TRUE(SubmitAhead("second", 2).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(SubmitAhead("urgent", 1, {.priority = 1}).ok());
  executor_.RunOneStep();
  executor_.RunOneStep();
  ASSERT_TRUE(SubmitAhead("third", 1).ok());
  RunAll();
  EXPECT_THAT(Ends(), ElementsAre("urgent", "second", "first", "third"));
}

TEST_F(AheadSpec, AdmissionKnowsThatTwoStepsMayBeUnderWay) {
  std::optional<Admission> urgent;
  auto job = std::make_unique<ScriptedJob>("long", 8, events_);
  job->during_step = [&](const RunControl&) {
    if (!urgent.has_value()) urgent = *Submit("urgent", 1, 1, {.priority = 1});
    return absl::OkStatus();
  };
  JobSize size = {.prompt_tokens = 100,
                  .prediction = Prediction{80.0, true},
                  .num_steps = 8,
                  .steps_under_way = 2};
  ASSERT_TRUE(executor_.Submit({}, size, std::move(job)).ok());
  executor_.RunOneStep();
  ASSERT_TRUE(urgent.has_value());
  EXPECT_EQ(urgent->predicted_seconds, 2 * 10 + 1);
}

// A long job a hundred times over, among short ones that come at random: nobody is
// delayed by later ones for more than a quarter of its own time and one step.
TEST_F(YieldSpec, NobodyIsDelayedBeyondItsPatience) {
  struct Delay {
    double delayed = 0;
    double bound = 0;
    bool done = false;
  };
  for (unsigned seed = 1; seed <= 20; ++seed) {
    std::mt19937 random(seed);
    std::vector<Delay> delays;
    delays.reserve(400);
    Events ignored;
    constexpr double kStepMax = 1;
    const auto submit = [&] {
      const int steps = 1 + static_cast<int>(random() % 30);
      const double step = kStepMax * static_cast<double>(1 + random() % 100) / 100;
      const size_t me = delays.size();
      delays.push_back({0, 0.25 * step * steps + kStepMax});
      auto job = std::make_unique<ScriptedJob>("job", steps, ignored);
      job->during_step = [&, me, step, steps, run = 0](const RunControl&) mutable {
        clock_.Advance(absl::Seconds(step));
        for (size_t i = 0; i < me; ++i) {
          if (!delays[i].done) delays[i].delayed += step;
        }
        delays[me].done = ++run == steps;
        return absl::OkStatus();
      };
      ASSERT_TRUE(executor_
                      .Submit({},
                              {.prediction = Prediction{step * steps, true},
                               .num_steps = steps},
                              std::move(job))
                      .ok());
    };
    bool worked = true;
    while (worked || delays.size() < 400) {
      for (uint32_t arrivals = random() % 4; arrivals > 2 && delays.size() < 400;
           --arrivals) {
        submit();
      }
      worked = executor_.RunOneStep();
    }
    int overtaken = 0;
    for (const Delay& delay : delays) {
      EXPECT_TRUE(delay.done) << "seed " << seed;
      EXPECT_LE(delay.delayed, delay.bound + 1e-6) << "seed " << seed;
      overtaken += delay.delayed > 0 ? 1 : 0;
    }
    EXPECT_GT(overtaken, 20) << "seed " << seed;
  }
}

}  // namespace
}  // namespace pbs::server
