// Spec: server/engine/executor.h, with threads.
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <atomic>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "server/engine/executor.h"

namespace pbs::server {
namespace {

// Counts its completions; its steps need no time.
class CountedJob final : public Job {
 public:
  CountedJob(int steps, std::atomic<int>& finished)
      : steps_(steps), finished_(finished) {}
  void Start(const JobTiming&) override {}
  absl::StatusOr<StepResult> Step(const RunControl&) override {
    ++steps_run_;
    return StepResult{steps_run_ == steps_, 0.5};
  }
  void Finish(const absl::Status&) override { ++finished_; }

 private:
  const int steps_;
  std::atomic<int>& finished_;
  int steps_run_ = 0;
};

TEST(ExecutorThreads, EveryAcceptedJobFinishesOnceWhoeverCancelsIt) {
  const RealClock clock;
  TimerQueue timers(clock);
  prometheus::Registry registry;
  EngineMetrics metrics(registry);
  Executor executor({.queue_requests_max = 64}, clock, timers, metrics);
  std::atomic<int> accepted = 0;
  std::atomic<int> finished = 0;
  std::promise<void> idle;
  {
    TimerThread timer_thread(timers);
    ExecutorThread executor_thread(executor);
    std::vector<std::thread> clients;
    for (int client = 0; client < 4; ++client) {
      clients.emplace_back([&, client] {
        for (int i = 0; i < 500; ++i) {
          JobTerms terms = {.priority = i % 3};
          if (i % 5 == 0) terms.deadline = clock.Now() + absl::Microseconds(200);
          const auto admission =
              executor.Submit(terms, {}, std::make_unique<CountedJob>(3, finished));
          if (!admission.ok()) continue;
          ++accepted;
          if ((i + client) % 2 == 0) executor.Cancel(admission->id);
        }
      });
    }
    for (std::thread& client : clients) client.join();
    executor.Drain([&] { idle.set_value(); });
    idle.get_future().wait();
    EXPECT_EQ(finished.load(), accepted.load());
  }
  EXPECT_GT(accepted.load(), 0);
  EXPECT_EQ(metrics.running.Value() + metrics.waiting.Value(), 0);
}

TEST(ExecutorThreads, StoppingTheThreadEndsAJobThatWouldRunForEver) {
  class EndlessJob final : public Job {
   public:
    EndlessJob(std::promise<void>& started, std::promise<absl::Status>& finished)
        : started_(started), finished_(finished) {}
    void Start(const JobTiming&) override { started_.set_value(); }
    absl::StatusOr<StepResult> Step(const RunControl&) override { return StepResult{}; }
    void Finish(const absl::Status& status) override { finished_.set_value(status); }

   private:
    std::promise<void>& started_;
    std::promise<absl::Status>& finished_;
  };
  const RealClock clock;
  TimerQueue timers(clock);
  prometheus::Registry registry;
  EngineMetrics metrics(registry);
  Executor executor({.queue_requests_max = 1}, clock, timers, metrics);
  std::promise<void> started;
  std::promise<absl::Status> finished;
  {
    ExecutorThread thread(executor);
    ASSERT_TRUE(
        executor.Submit({}, {}, std::make_unique<EndlessJob>(started, finished)).ok());
    started.get_future().wait();
  }
  EXPECT_EQ(finished.get_future().get(),
            absl::UnavailableError("the server is shutting down"));
}

}  // namespace
}  // namespace pbs::server
