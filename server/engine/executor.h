// The executor: a bounded queue of jobs and the rules by which they run and end.
//
//   Submit -> [waiting] -> Start -> Step, Step, ... -> Finish
//
// Jobs with equal keys may run as one batch (Job::RunWith): when a job starts, waiting
// jobs that fit join it. Before every step Pick() looks at all jobs. So a job of higher
// priority overtakes a long one between two of its steps, and shorter jobs do within
// the long one's patience (ExecutorOptions::yield_share). A timer enforces a job's
// deadline: a waiting job ends at once, a running one when it next reads
// RunControl::stop.
//
// ExecutorThread runs it in a server; a test calls RunOneStep() itself.
//
// Threading: all methods are safe from any thread except RunOneStep(), which belongs to
// one thread. Jobs are called without a lock held. The thread that runs the timer queue
// must have stopped before the executor is destroyed. Memory: at most
// queue_requests_max waiting jobs, and the started ones.
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

// The size of a job, known before it runs.
struct JobSize {
  int64_t prompt_tokens = 0;             // 0 for raw attention
  std::optional<Prediction> prediction;  // none until similar work was measured
  int32_t num_steps = 1;                 // of about the same duration
  // Steps whose work may be under way when a call of Step() returns, its own included.
  int32_t steps_under_way = 1;
};

// Accepted and unfinished jobs.
struct Backlog {
  double seconds = 0;  // predicted; 0 for jobs without a prediction
  int32_t jobs = 0;
  // Time since a step last ended, or since an idle executor got work; 0 without work.
  double progress_age_seconds = 0;
};

struct ExecutorOptions {
  int32_t queue_requests_max = 0;  // waiting
  // A job's patience is the time by which later jobs may delay it: this share of its
  // own predicted time, or less where its deadline would be missed. 0: strictly in
  // order of arrival.
  double yield_share = 0;
  // Tokens of jobs that run as one batch (Job::RunWith); 1: every job runs alone.
  int32_t batch_tokens_max = 1;
};

class Executor {
 public:
  // The most jobs of one batch.
  static constexpr int32_t kBatchJobsMax = 64;
  // A job is refused when this share of its predicted time already exceeds its
  // deadline.
  static constexpr double kRefusalConfidence = 0.8;

  Executor(const ExecutorOptions& options, const Clock& clock, TimerQueue& timers,
           EngineMetrics& metrics);
  // Calls Shutdown() and ends the remaining jobs.
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Errors as Engine::SubmitAttend(); the job is then destroyed without a call of
  // Finish(). The job may run and finish before this returns.
  absl::StatusOr<Admission> Submit(const JobTerms& terms, const JobSize& size,
                                   std::unique_ptr<Job> job);

  // Admission::predicted_seconds of a job that would be submitted now; nullopt without
  // a prediction of its own.
  std::optional<double> Predict(const JobTerms& terms, const JobSize& size) const {
    if (!size.prediction.has_value()) return std::nullopt;
    MutexLock lock(mutex_);
    return Place(terms, size).predicted_seconds;
  }

  Backlog backlog() const;

  // Ends the job with CANCELLED, or DEADLINE_EXCEEDED when that is the reason or its
  // deadline has passed: a waiting one before this returns, a started one soon. No-op
  // when finished.
  void Cancel(JobId id, CancelReason reason = CancelReason::kCaller);

  // As Engine::Drain().
  void Drain(absl::AnyInvocable<void()> on_idle);

  // As Drain(), and all unfinished jobs end with UNAVAILABLE. Returns their number.
  int32_t Shutdown();

  // Ends jobs that must end and runs one step of the job that Pick() chooses; false
  // when there was nothing to do.
  bool RunOneStep();

 private:
  friend class ExecutorThread;

  enum class StopReason : uint8_t { kNone, kCancelled, kDeadline, kShutdown };

  // Guarded by mutex_, except `stop` and, during a step, `job`.
  struct Record {
    JobTerms terms;
    JobSize size;
    std::unique_ptr<Job> job;
    absl::Time admitted;
    bool started = false;
    double progress = 0;
    double delayed_seconds = 0;  // by later jobs of its priority
    int32_t batch_tokens = 0;    // Job::batch_tokens(), and the job's key
    BatchKey batch_key;
    JobId batch = 0;  // the first job of its batch; 0: runs alone
    StopReason stop_reason = StopReason::kNone;
    std::atomic<bool> stop{false};
    TimerId timer = 0;

    double SecondsLeft() const;
    // Upper bound of the remaining time of the steps under way.
    double StepSecondsLeft() const;
  };
  using Records = std::map<JobId, std::unique_ptr<Record>>;  // in order of arrival
  // The jobs of a batch, or one job, in order of arrival.
  using Batch = std::vector<std::pair<JobId, Record*>>;

  // `seconds_ahead` is the predicted time of the jobs that run before it.
  double PatienceSeconds(const Record& record, double seconds_ahead,
                         absl::Time now) const;
  // True when a job that arrives now may go before all jobs of its priority.
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
  // Identifies the run of a job: the first job of its batch, or the job itself.
  static JobId RunOf(JobId id, const Record& record) {
    return record.batch != 0 ? record.batch : id;
  }
  Batch BatchOf(JobId run) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Marks `id`, and the waiting jobs that join its batch, as started.
  void JoinWaiting(JobId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::unique_ptr<Record> Take(JobId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MarkStopped(Record& record, StopReason reason)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // True when the job ends because of this call.
  bool Stop(JobId id, StopReason reason);
  // Sets the last run aside when `next` is another one, so that nothing of it is under
  // way.
  void SetAsideOther(const Batch& next);
  // Starts the jobs. Jobs that cannot run with the first one are removed from `batch`.
  void Start(Batch& batch);
  // All but the first job wait again, or end if they were stopped meanwhile.
  void Disband(Batch& batch);
  // Runs one step and finishes the jobs that it ends.
  void Step(const Batch& batch);
  // A step of a batch took `seconds`: charges them to the patience of the jobs that it
  // overtook. A job that arrived between jobs of the batch is charged all of them.
  void ChargeDelay(const Batch& batch, double seconds)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Finish(std::unique_ptr<Record> record, const absl::Status& status);
  // Waits for work; false after a shutdown when no job is left.
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
  // The job whose step is under way; 0: none
  JobId stepping_ ABSL_GUARDED_BY(mutex_) = 0;
  JobId stepped_run_ ABSL_GUARDED_BY(mutex_) = 0;  // the run of the last step; 0: none
  // Jobs whose Finish() has not returned
  int32_t num_unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time progressed_ ABSL_GUARDED_BY(mutex_);  // see Backlog
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<absl::AnyInvocable<void()>> on_idle_ ABSL_GUARDED_BY(mutex_);
};

// Runs an executor until destroyed; then ends remaining jobs with UNAVAILABLE.
class ExecutorThread {
 public:
  // Calls `after_step`, which may be null, on the thread after every step.
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
