// The executor: a bounded queue of jobs and the rules by which they run and end.
//
//   Submit -> [waiting] -> Start -> Step, Step, ... -> Finish
//
// Jobs that say so run as one (Job::RunWith): a job that starts takes along those that
// wait and fit. Before every step Pick() looks at all jobs, so that a more important
// one overtakes a long one between two of its steps, and short ones do while its
// patience lasts. A job's deadline is a timer: a waiting job ends at once, a running
// one at its next look at RunControl::stop.
//
// ExecutorThread runs it in a server; a test calls RunOneStep() itself.
//
// Threading: all methods are safe from any thread but RunOneStep(), which belongs to
// one thread. Jobs are called without a lock held. The thread that runs the timer queue
// must have stopped before the executor is destroyed. Memory: at most
// queue_requests_max waiting jobs, and those that have started.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/base/clock.h"
#include "server/base/mutex.h"
#include "server/base/timers.h"
#include "server/engine/cost_model.h"
#include "server/engine/job.h"
#include "server/engine/job_terms.h"
#include "server/engine/scheduler.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

// What is known about a job before it runs.
struct JobSize {
  int64_t prompt_tokens = 0;             // 0 for raw attention
  std::optional<Prediction> prediction;  // none while nothing like it was measured
  int32_t num_steps = 1;                 // of about the same length
  // Steps whose work may be under way at the end of one's call, that one included.
  int32_t steps_under_way = 1;
};

// All that was accepted and is not finished.
struct Backlog {
  double seconds = 0;  // predicted; jobs without a prediction count nothing
  int32_t jobs = 0;
  // Since a step last ended, or since work came to an idle executor; 0 without work.
  double progress_age_seconds = 0;
};

struct ExecutorOptions {
  int32_t queue_requests_max = 0;  // waiting
  // A job's patience: this share of its own predicted time, and never so much that its
  // deadline would be missed for it. 0: strictly in order of arrival.
  double yield_share = 0;
  // Of jobs that run as one (Job::RunWith); 1: none do.
  int32_t batch_tokens_max = 1;
};

class Executor {
 public:
  // Jobs that run as one.
  static constexpr int32_t kBatchJobsMax = 64;
  // A deadline is refused when this share of the predicted time already passes it.
  static constexpr double kRefusalConfidence = 0.8;

  Executor(const ExecutorOptions& options, const Clock& clock, TimerQueue& timers,
           EngineMetrics& metrics);
  // Shutdown(), and ends what is left.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Errors as Engine::SubmitAttend(); the job is then destroyed and Finish() never
  // called. The job may run, and finish, before this returns.
  absl::StatusOr<Admission> Submit(const JobTerms& terms, const JobSize& size,
                                   std::unique_ptr<Job> job);

  Backlog backlog() const;

  // Ends the job with CANCELLED, or DEADLINE_EXCEEDED when that is the reason or its
  // deadline has passed: a waiting one before this returns, a started one soon. No-op
  // when finished.
  void Cancel(JobId id, CancelReason reason = CancelReason::kCaller);

  // As Engine::Drain().
  void Drain(absl::AnyInvocable<void()> on_idle);

  // As Drain(), and everything there is ends with UNAVAILABLE. Returns how many jobs
  // this cuts.
  int32_t Shutdown();

  // Ends what must end and runs one step of what Pick() says; false when there was
  // nothing to do.
  bool RunOneStep();

 private:
  friend class ExecutorThread;

  enum class StopReason : uint8_t { kNone, kCancelled, kDeadline, kShutdown };

  // Guarded by mutex_, but for `stop` and, while it steps, `job`.
  struct Record {
    JobTerms terms;
    JobSize size;
    std::unique_ptr<Job> job;
    absl::Time admitted;
    bool started = false;
    double progress = 0;
    double delayed_seconds = 0;  // by later jobs of its priority
    int32_t batch_tokens = 0;    // as the job says, and its key
    BatchKey batch_key;
    JobId batch = 0;  // of those that run as one: the first; 0: alone
    StopReason stop_reason = StopReason::kNone;
    std::atomic<bool> stop{false};
    TimerId timer = 0;

    double SecondsLeft() const;
    // What is left of the steps that are under way, at most.
    double StepSecondsLeft() const;
  };
  using Records = std::map<JobId, std::unique_ptr<Record>>;  // in order of arrival
  // Jobs that run as one, or one job, in order of arrival.
  using Batch = std::vector<std::pair<JobId, Record*>>;

  // `seconds_ahead` are those of the jobs that run before it.
  double PatienceSeconds(const Record& record, double seconds_ahead,
                         absl::Time now) const;
  // Whether all jobs of its priority would let a job that arrives now go first.
  bool MayOvertake(const JobTerms& terms, const JobSize& size) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The place in the queue of a job that arrives now, and the time until it is done.
  Admission Place(const JobTerms& terms, const JobSize& size) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckAdmission(const JobTerms& terms, const JobSize& size,
                              const Admission& place) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  int32_t NumWaiting() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void UpdateGauges() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<Candidate> Candidates(absl::Time now) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static void AddToBatch(const Record& record, std::vector<Candidate>& candidates,
                         Candidate& candidate, std::map<JobId, size_t>& first_of);
  // The run of a job: of those that run as one the first, else the job itself.
  static JobId RunOf(JobId id, const Record& record) {
    return record.batch != 0 ? record.batch : id;
  }
  Batch BatchOf(JobId run) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Marks `id` as started, and with it the waiting jobs that run with it.
  void JoinWaiting(JobId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::unique_ptr<Record> Take(JobId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MarkStopped(Record& record, StopReason reason)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // True when the job ends because of this call.
  bool Stop(JobId id, StopReason reason);
  // Another run than that of `next` must leave nothing under way.
  void SetAsideOther(const Batch& next);
  // Those that cannot run with the first one leave `batch`.
  void Start(Batch& batch);
  // All but the first go back to wait, or end if they were stopped meanwhile.
  void Disband(Batch& batch);
  // Runs one step and finishes what that ends.
  void Step(const Batch& batch);
  // A step of a batch took `seconds`, and whoever it has overtaken waited. One that
  // arrived between jobs of the batch is charged all of it.
  void ChargeDelay(const Batch& batch, double seconds)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Finish(std::unique_ptr<Record> record, const absl::Status& status);
  // Waits for work; false when shut down and nothing is left.
  bool WaitForWork();

  const ExecutorOptions options_;
  const Clock& clock_;
  TimerQueue& timers_;
  EngineMetrics& metrics_;
  const EngineMetrics::Part metrics_part_;

  mutable Mutex mutex_;
  CondVar work_arrived_;
  JobId last_id_ ABSL_GUARDED_BY(mutex_) = 0;
  Records records_ ABSL_GUARDED_BY(mutex_);
  JobId stepping_ ABSL_GUARDED_BY(mutex_) = 0;     // its step is under way; 0: none
  JobId stepped_run_ ABSL_GUARDED_BY(mutex_) = 0;  // the last one; 0: none
  int32_t num_unfinished_ ABSL_GUARDED_BY(mutex_) = 0;  // Finish() has not returned
  absl::Time progressed_ ABSL_GUARDED_BY(mutex_);       // see Backlog
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<absl::AnyInvocable<void()>> on_idle_ ABSL_GUARDED_BY(mutex_);
};

// Runs an executor until destroyed; ends what is left with UNAVAILABLE.
class ExecutorThread {
 public:
  // `after_step` is called on the thread after every step; may be null.
  explicit ExecutorThread(Executor& executor, std::function<void()> after_step = {});
  ~ExecutorThread();
  ExecutorThread(const ExecutorThread&) = delete;
  ExecutorThread& operator=(const ExecutorThread&) = delete;

 private:
  Executor& executor_;
  const std::function<void()> after_step_;
  std::thread thread_;
};

}  // namespace pbs::server
