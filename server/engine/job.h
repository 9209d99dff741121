// A job as the executor sees it: something that runs step by step and then ends.
//
// Threading: Start() and Step() are called by the executor's thread only. Finish() by
// the same thread, or, for a job that never started, by whichever thread ended it.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pbs/attention.h"

namespace pbs::server {

struct JobTiming {
  absl::Time admitted;
  absl::Time started;
};

struct StepResult {
  bool done = false;    // the result is there; only Finish() is left
  double progress = 0;  // share of the job's steps that have run, [0, 1]
};

// Jobs of equal keys may run as one.
struct BatchKey {
  const void* model = nullptr;
  AttentionOptions attention = {};

  bool operator==(const BatchKey&) const = default;
};

class Job {
 public:
  virtual ~Job() = default;

  // Tokens that it would bring to a run that it shares; 0: it runs alone.
  virtual int32_t batch_tokens() const { return 0; }
  virtual BatchKey batch_key() const { return {}; }
  // Before Start(): makes `others`, which have this job's key, part of its run. From
  // then on a Step() of any of them is a step of all, and an error is everyone's. Each
  // is started and finished as if it were alone, perhaps before the others. False: it
  // cannot be, and nothing has changed.
  virtual bool RunWith(std::span<Job* const> /*others*/) { return false; }

  // Once, before the first step.
  virtual void Start(const JobTiming& timing) = 0;

  // Runs the next step. When `control.stop` turns true it returns soon, with any
  // status. An error ends the job with that status.
  virtual absl::StatusOr<StepResult> Step(const RunControl& control) = 0;

  // Another job is about to use the backend: nothing of this one may be under way there
  // from then on. May come between any two steps of a job that has not ended; an error
  // is that of the next step.
  virtual void SetAside() {}

  // Once, last: gives back everything the job holds and then completes its listener,
  // with the result when `status` is OK. The job is destroyed afterwards. What jobs
  // that run as one share goes back with the last of them.
  virtual void Finish(const absl::Status& status) = 0;
};

}  // namespace pbs::server
