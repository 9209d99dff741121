// A job as the executor sees it: something that runs step by step and then ends.
//
// Threading: Start() and Step() are called by the executor's thread only. Finish() by
// the same thread, or, for a job that never started, by whichever thread ended it.
#pragma once

#include <cstdint>

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

class Job {
 public:
  virtual ~Job() = default;

  // Once, before the first step.
  virtual void Start(const JobTiming& timing) = 0;

  // Runs the next step. When `control.stop` turns true it returns soon, with any
  // status. An error ends the job with that status.
  virtual absl::StatusOr<StepResult> Step(const RunControl& control) = 0;

  // Once, last: gives back everything the job holds and then completes its listener,
  // with the result when `status` is OK. The job is destroyed afterwards.
  virtual void Finish(const absl::Status& status) = 0;
};

}  // namespace pbs::server
