// A job that a test scripts and that records its calls, and an executor for it.
#pragma once

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "server/engine/executor.h"
#include "server/engine/job.h"

namespace pbs::server::testing_support {

using Events = std::vector<std::string>;

// Runs `steps` steps; records its calls in `events`.
class ScriptedJob final : public Job {
 public:
  ScriptedJob(std::string name, int steps, Events& events)
      : name_(std::move(name)), steps_(steps), events_(events) {}

  // Called inside every step.
  std::function<absl::Status(const RunControl&)> during_step;

  std::function<void()> on_set_aside;

  int32_t tokens = 0;  // Job::batch_tokens()
  BatchKey key;
  bool runs_with_others = true;
  std::function<void()> during_join;

  int32_t batch_tokens() const override { return tokens; }
  BatchKey batch_key() const override { return key; }
  bool RunWith(std::span<Job* const> others) override {
    std::string event = name_ + " runs with";
    for (Job* other : others) event += " " + static_cast<ScriptedJob*>(other)->name_;
    events_.push_back(event + (runs_with_others ? "" : "? no"));
    if (during_join) during_join();
    return runs_with_others;
  }
  void Start(const JobTiming& timing) override {
    events_.push_back(name_ + " starts after " +
                      absl::FormatDuration(timing.started - timing.admitted));
  }
  absl::StatusOr<StepResult> Step(const RunControl& control) override {
    events_.push_back(name_ + " steps");
    if (during_step) {
      if (absl::Status status = during_step(control); !status.ok()) return status;
    }
    ++steps_run_;
    return StepResult{steps_run_ == steps_, static_cast<double>(steps_run_) / steps_};
  }
  void SetAside() override {
    if (on_set_aside) on_set_aside();
  }
  void Finish(const absl::Status& status) override {
    events_.push_back(name_ + " " + absl::StatusCodeToString(status.code()));
    message_ = std::string(status.message());
    if (last_message != nullptr) *last_message = message_;
  }

  std::string* last_message = nullptr;

 private:
  const std::string name_;
  const int steps_;
  Events& events_;
  int steps_run_ = 0;
  std::string message_;
};

// An executor whose steps a test takes by hand, on a clock that stands.
class SteppedExecutor : public testing::Test {
 protected:
  explicit SteppedExecutor(const ExecutorOptions& options)
      : executor_(options, clock_, timers_, metrics_) {}

  void RunAll() {
    while (executor_.RunOneStep()) {
    }
  }

  ManualClock clock_;
  TimerQueue timers_{clock_};
  prometheus::Registry registry_;
  EngineMetrics metrics_{registry_};
  Events events_;
  Executor executor_;
};

}  // namespace pbs::server::testing_support
