// The executor's view of a job: it runs step by step and then ends.
//
// Threading: only the executor's thread calls Start() and Step(). It also calls
// Finish(), except for a job that never started: the thread that ended it does.
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

// Jobs of equal keys may run as one batch.
struct BatchKey {
  const void* model = nullptr;
  AttentionOptions attention = {};
  const float* head_thresholds = nullptr;  // PrefillProblem::head_thresholds

  bool operator==(const BatchKey&) const = default;
};

class Job {
 public:
  virtual ~Job() = default;

  // Tokens that it adds to a shared run; 0: it runs alone.
  virtual int32_t batch_tokens() const { return 0; }
  virtual BatchKey batch_key() const { return {}; }
  // Called before Start(). Adds `others`, which have this job's key, to its run.
  // Afterwards a Step() of any of them is a step of all, and an error ends all. Each is
  // started and finished as if it were alone, perhaps before the others. Returns false,
  // with nothing changed, when they cannot share a run.
  virtual bool RunWith(std::span<Job* const> /*others*/) { return false; }

  // Called once, before the first step.
  virtual void Start(const JobTiming& timing) = 0;

  // Runs the next step. When `control.stop` turns true it returns soon, with any
  // status. An error ends the job with that status.
  virtual absl::StatusOr<StepResult> Step(const RunControl& control) = 0;

  // Called before another job uses the backend: after the call no work of this job may
  // be under way there. It may come between any two steps of an unfinished job. The
  // next step returns its error.
  virtual void SetAside() {}

  // Called once, last. Frees everything the job holds and then completes its listener,
  // with the result when `status` is OK. The job is destroyed afterwards. Memory that a
  // batch shares is freed with its last job.
  virtual void Finish(const absl::Status& status) = 0;
};

}  // namespace pbs::server
