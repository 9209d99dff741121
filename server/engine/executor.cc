#include "server/engine/executor.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "pbs/check.h"

namespace pbs::server {

static absl::Status DeadlineStatus(bool started) {
  return absl::DeadlineExceededError(
      started ? "the deadline passed while the request ran"
              : "the deadline passed while the request waited");
}

double Executor::Record::SecondsLeft() const {
  return size.prediction.has_value() ? size.prediction->seconds * (1 - progress) : 0;
}

double Executor::Record::StepSecondsLeft() const {
  if (!size.prediction.has_value()) return 0;
  const double step = size.prediction->seconds / size.num_steps;
  return std::min(SecondsLeft(), size.steps_under_way * step);
}

Executor::Executor(const ExecutorOptions& options, const Clock& clock,
                   TimerQueue& timers, EngineMetrics& metrics)
    : options_(options),
      clock_(clock),
      timers_(timers),
      metrics_(metrics),
      metrics_part_(metrics.AddPart()) {}

Executor::~Executor() {
  Shutdown();
  while (RunOneStep()) {
  }
}

// ---- admission

double Executor::PatienceSeconds(const Record& record, double seconds_ahead,
                                 absl::Time now) const {
  if (!record.size.prediction.has_value()) return 0;
  const double patience =
      options_.yield_share * record.size.prediction->seconds - record.delayed_seconds;
  const double slack = absl::ToDoubleSeconds(record.terms.deadline - now) -
                       seconds_ahead - record.SecondsLeft();
  return std::min(patience, slack);
}

bool Executor::MayOvertake(const JobTerms& terms, const JobSize& size) const {
  if (!size.prediction.has_value()) return false;
  const std::vector<Candidate> candidates = Candidates(clock_.Now());
  return std::all_of(candidates.begin(), candidates.end(), [&](const Candidate& other) {
    return other.stopped || other.priority != terms.priority ||
           size.prediction->seconds <= other.patience_seconds;
  });
}

Admission Executor::Place(const JobTerms& terms, const JobSize& size) const {
  Admission place;
  double seconds_ahead = 0;
  const bool overtakes = MayOvertake(terms, size);
  for (const auto& [id, record] : records_) {
    const bool is_overtaken = overtakes && record->terms.priority == terms.priority &&
                              record->SecondsLeft() > size.prediction->seconds;
    const bool runs_before = record->terms.priority >= terms.priority && !is_overtaken;
    if (runs_before || record->started) ++place.queue_position;
    if (runs_before) {
      seconds_ahead += record->SecondsLeft();
    } else if (id == stepping_) {
      seconds_ahead += record->StepSecondsLeft();  // then it is overtaken
    }
  }
  if (size.prediction.has_value()) {
    place.predicted_seconds = seconds_ahead + size.prediction->seconds;
  }
  return place;
}

absl::Status Executor::CheckAdmission(const JobTerms& terms, const JobSize& size,
                                      const Admission& place) const {
  if (draining_) {
    metrics_.Rejected(RejectReason::kDraining).Increment();
    return absl::UnavailableError("the server is draining");
  }
  const absl::Duration left = terms.deadline - clock_.Now();
  if (left <= absl::ZeroDuration()) {
    metrics_.Rejected(RejectReason::kDeadline).Increment();
    return absl::DeadlineExceededError("the deadline has passed");
  }
  if (NumWaiting() >= options_.queue_requests_max) {
    metrics_.Rejected(RejectReason::kQueueFull).Increment();
    return absl::ResourceExhaustedError(absl::StrCat(
        "the queue has ", NumWaiting(), " waiting requests; queue_requests_max is ",
        options_.queue_requests_max));
  }
  if (size.prediction.has_value() && size.prediction->fresh &&
      absl::Seconds(kRefusalConfidence * place.predicted_seconds) > left) {
    metrics_.Rejected(RejectReason::kDeadline).Increment();
    return absl::DeadlineExceededError(absl::StrFormat(
        "the deadline in %.3g s cannot be met: the request would be done in %.3g s, "
        "with %d ahead of it",
        absl::ToDoubleSeconds(left), place.predicted_seconds, place.queue_position));
  }
  return absl::OkStatus();
}

absl::StatusOr<Admission> Executor::Submit(const JobTerms& terms, const JobSize& size,
                                           std::unique_ptr<Job> job) {
  MutexLock lock(mutex_);
  Admission place = Place(terms, size);
  if (absl::Status status = CheckAdmission(terms, size, place); !status.ok()) {
    return status;
  }
  place.id = ++last_id_;
  auto record = std::make_unique<Record>();
  record->batch_tokens = job->batch_tokens();
  record->batch_key = job->batch_key();
  record->terms = terms;
  record->size = size;
  record->job = std::move(job);
  record->admitted = clock_.Now();
  record->timer = timers_.At(
      terms.deadline, [this, id = place.id] { Stop(id, StopReason::kDeadline); });
  if (num_unfinished_ == 0) progressed_ = record->admitted;
  records_.emplace(place.id, std::move(record));
  ++num_unfinished_;
  UpdateGauges();
  work_arrived_.NotifyOne();
  return place;
}

int32_t Executor::NumWaiting() const {
  int32_t waiting = 0;
  for (const auto& [id, record] : records_) waiting += record->started ? 0 : 1;
  return waiting;
}

Backlog Executor::backlog() const {
  MutexLock lock(mutex_);
  Backlog backlog = {.jobs = num_unfinished_};
  if (num_unfinished_ > 0) {
    backlog.progress_age_seconds = absl::ToDoubleSeconds(clock_.Now() - progressed_);
  }
  for (const auto& [id, record] : records_) backlog.seconds += record->SecondsLeft();
  return backlog;
}

void Executor::UpdateGauges() {
  int64_t tokens = 0;
  double seconds = 0;
  for (const auto& [id, record] : records_) {
    tokens += record->size.prompt_tokens;
    seconds += record->SecondsLeft();
  }
  const int32_t waiting = NumWaiting();
  metrics_.waiting.Set(metrics_part_, waiting);
  // A job counts until it has freed what it held, which is after its listener's
  // OnDone().
  metrics_.running.Set(metrics_part_, static_cast<double>(num_unfinished_) - waiting);
  metrics_.backlog_tokens.Set(metrics_part_, static_cast<double>(tokens));
  metrics_.backlog_seconds.Set(metrics_part_, seconds);
}

// ---- running

bool Executor::RunOneStep() {
  std::vector<std::unique_ptr<Record>> ended;
  Batch batch;
  bool is_first = false;
  {
    MutexLock lock(mutex_);
    const absl::Time now = clock_.Now();
    const Decision decision = Pick(Candidates(now), now);
    for (JobId id : decision.ended) {
      Record& record = *records_.find(id)->second;
      if (record.stop_reason == StopReason::kNone) {
        MarkStopped(record, StopReason::kDeadline);
      }
      ended.push_back(Take(id));
    }
    if (decision.next.has_value()) {
      is_first = !records_.at(*decision.next)->started;
      if (is_first) JoinWaiting(*decision.next);
      batch = BatchOf(RunOf(*decision.next, *records_.at(*decision.next)));
      stepping_ = *decision.next;
    }
    UpdateGauges();
  }
  const bool did_something = !batch.empty() || !ended.empty();
  for (auto& record : ended) {
    Finish(std::move(record), absl::OkStatus());
  }
  if (!batch.empty()) SetAsideOther(batch);
  if (is_first) Start(batch);
  if (!batch.empty()) Step(batch);
  return did_something;
}

std::vector<Candidate> Executor::Candidates(absl::Time now) const {
  const auto ends = [now](const Record& record) {
    return record.stop_reason != StopReason::kNone || record.terms.deadline <= now;
  };
  std::map<int32_t, double> seconds;  // that all of a priority take
  for (const auto& [id, record] : records_) {
    if (!ends(*record)) seconds[record->terms.priority] += record->SecondsLeft();
  }
  // Those before a job: the more important, and the earlier of its own priority.
  std::map<int32_t, double> ahead;
  double more_important = 0;
  for (auto entry = seconds.rbegin(); entry != seconds.rend(); ++entry) {
    ahead[entry->first] = more_important;
    more_important += entry->second;
  }
  std::vector<Candidate> candidates;
  candidates.reserve(records_.size());
  std::map<JobId, size_t> first_of;  // of a batch, among the candidates
  for (const auto& [id, record] : records_) {
    Candidate candidate = {.id = id,
                           .priority = record->terms.priority,
                           .deadline = record->terms.deadline,
                           .stopped = ends(*record)};
    if (!candidate.stopped) {
      double& before = ahead[candidate.priority];
      candidate.seconds_left = record->SecondsLeft();
      candidate.patience_seconds = PatienceSeconds(*record, before, now);
      before += candidate.seconds_left;
      if (record->batch != 0) AddToBatch(*record, candidates, candidate, first_of);
    }
    candidates.push_back(candidate);
  }
  return candidates;
}

// The first that goes on stands for all of its batch.
void Executor::AddToBatch(const Record& record, std::vector<Candidate>& candidates,
                          Candidate& candidate, std::map<JobId, size_t>& first_of) {
  const auto [entry, is_first] = first_of.try_emplace(record.batch, candidates.size());
  candidate.follows = !is_first;
  if (is_first) return;
  Candidate& first = candidates[entry->second];
  first.seconds_left += candidate.seconds_left;
  first.patience_seconds = std::min(first.patience_seconds, candidate.patience_seconds);
}

Executor::Batch Executor::BatchOf(JobId run) const {
  Batch batch;
  for (const auto& [id, record] : records_) {
    if (RunOf(id, *record) == run) batch.emplace_back(id, record.get());
  }
  return batch;
}

void Executor::JoinWaiting(JobId id) {
  Record& first = *records_.at(id);
  first.started = true;
  if (first.batch_tokens == 0) return;
  const std::vector<Candidate> candidates = Candidates(clock_.Now());
  std::vector<Companion> companions;
  size_t next = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const Candidate& candidate = candidates[i];
    const Record& record = *records_.at(candidate.id);
    if (candidate.id == id) next = i;
    const bool may_join = !record.started && record.batch_tokens > 0 &&
                          record.batch_key == first.batch_key && !candidate.stopped &&
                          candidate.priority == first.terms.priority;
    if (may_join) companions.push_back({i, record.batch_tokens});
  }
  for (size_t index : PickCompanions(candidates, next, companions,
                                     options_.batch_tokens_max - first.batch_tokens,
                                     kBatchJobsMax - 1)) {
    Record& joined = *records_.at(candidates[index].id);
    joined.started = true;
    joined.batch = first.batch = id;
  }
}

// Records of jobs that have started are taken out by this thread alone, so those of a
// batch stay valid.
void Executor::SetAsideOther(const Batch& next) {
  Batch last;
  {
    MutexLock lock(mutex_);
    const JobId run = RunOf(next.front().first, *next.front().second);
    if (run != stepped_run_) last = BatchOf(stepped_run_);
    stepped_run_ = run;
  }
  if (last.empty()) return;
  const absl::Time begin = clock_.Now();
  last.front().second->job->SetAside();
  MutexLock lock(mutex_);
  ChargeDelay(last, absl::ToDoubleSeconds(clock_.Now() - begin));
}

void Executor::Start(Batch& batch) {
  if (batch.size() > 1) {
    std::vector<Job*> others;
    for (const auto& [id, record] : std::span(batch).subspan(1)) {
      others.push_back(record->job.get());
    }
    if (!batch.front().second->job->RunWith(others)) Disband(batch);
  }
  for (const auto& [id, record] : batch) {
    const JobTiming timing = {record->admitted, clock_.Now()};
    metrics_.queue_time.Observe(
        absl::ToDoubleSeconds(timing.started - timing.admitted));
    record->job->Start(timing);
  }
}

void Executor::Disband(Batch& batch) {
  std::vector<std::unique_ptr<Record>> ended;
  {
    MutexLock lock(mutex_);
    for (const auto& [id, record] : batch) {
      record->batch = 0;
      if (record == batch.front().second) continue;
      record->started = false;
      if (record->stop_reason != StopReason::kNone) ended.push_back(Take(id));
    }
    UpdateGauges();
  }
  batch.resize(1);
  for (auto& record : ended) Finish(std::move(record), absl::OkStatus());
}

void Executor::Step(const Batch& batch) {
  Record& first = *batch.front().second;
  const absl::Time begin = clock_.Now();
  // One of several must not stop the others: it leaves when the step is over.
  const absl::StatusOr<StepResult> result =
      first.job->Step({batch.size() == 1 ? &first.stop : nullptr});
  std::vector<std::unique_ptr<Record>> ended;
  {
    MutexLock lock(mutex_);
    stepping_ = 0;
    progressed_ = clock_.Now();
    ChargeDelay(batch, absl::ToDoubleSeconds(clock_.Now() - begin));
    for (const auto& [id, record] : batch) {
      if (result.ok()) record->progress = result->progress;
      const bool goes_on =
          result.ok() && !result->done && record->stop_reason == StopReason::kNone;
      if (!goes_on) ended.push_back(Take(id));
    }
    UpdateGauges();
  }
  for (auto& record : ended) Finish(std::move(record), result.status());
}

void Executor::ChargeDelay(const Batch& batch, double seconds) {
  const Record& first = *batch.front().second;
  for (auto& [id, record] : records_) {
    if (id >= batch.back().first) break;
    const bool runs =
        record.get() == &first || (first.batch != 0 && record->batch == first.batch);
    if (!runs && record->terms.priority == first.terms.priority) {
      record->delayed_seconds += seconds;
    }
  }
}

// ---- ending

std::unique_ptr<Executor::Record> Executor::Take(JobId id) {
  const auto entry = records_.find(id);
  PBS_CHECK(entry != records_.end());
  std::unique_ptr<Record> record = std::move(entry->second);
  records_.erase(entry);
  timers_.Cancel(record->timer);
  return record;
}

void Executor::MarkStopped(Record& record, StopReason reason) {
  const bool late = record.terms.deadline <= clock_.Now();
  record.stop_reason =
      reason == StopReason::kCancelled && late ? StopReason::kDeadline : reason;
  record.stop.store(true, std::memory_order_relaxed);
}

bool Executor::Stop(JobId id, StopReason reason) {
  std::unique_ptr<Record> ended;
  {
    MutexLock lock(mutex_);
    const auto entry = records_.find(id);
    if (entry == records_.end()) return false;
    Record& record = *entry->second;
    if (record.stop_reason != StopReason::kNone) return false;
    MarkStopped(record, reason);
    if (record.started) return true;  // the executor's thread ends it
    ended = Take(id);
    UpdateGauges();
  }
  Finish(std::move(ended), absl::OkStatus());
  return true;
}

void Executor::Cancel(JobId id, CancelReason reason) {
  Stop(id, reason == CancelReason::kDeadline ? StopReason::kDeadline
                                             : StopReason::kCancelled);
}

// A reason to stop wins over what the last step said.
void Executor::Finish(std::unique_ptr<Record> record, const absl::Status& status) {
  absl::Status final_status = status;
  WasteReason waste = WasteReason::kError;
  switch (record->stop_reason) {
    case StopReason::kNone:
      break;
    case StopReason::kCancelled:
      final_status = absl::CancelledError("the request was cancelled");
      waste = WasteReason::kCancelled;
      break;
    case StopReason::kDeadline:
      final_status = DeadlineStatus(record->started);
      waste = WasteReason::kDeadline;
      if (!record->started) metrics_.Rejected(RejectReason::kDeadline).Increment();
      break;
    case StopReason::kShutdown:
      final_status = absl::UnavailableError("the server is shutting down");
      waste = WasteReason::kShutdown;
      break;
  }
  if (!final_status.ok() && record->progress > 0) {
    metrics_.TokensWasted(waste).Increment(
        record->progress * static_cast<double>(record->size.prompt_tokens));
  }
  record->job->Finish(final_status);
  record.reset();

  std::vector<absl::AnyInvocable<void()>> callbacks;
  {
    MutexLock lock(mutex_);
    --num_unfinished_;
    UpdateGauges();
    if (draining_ && num_unfinished_ == 0) callbacks.swap(on_idle_);
  }
  for (auto& callback : callbacks) callback();
}

void Executor::Drain(absl::AnyInvocable<void()> on_idle) {
  {
    MutexLock lock(mutex_);
    draining_ = true;
    if (num_unfinished_ > 0) {
      on_idle_.push_back(std::move(on_idle));
      return;
    }
  }
  on_idle();
}

int32_t Executor::Shutdown() {
  std::vector<JobId> ids;
  {
    MutexLock lock(mutex_);
    draining_ = true;
    shut_down_ = true;
    for (const auto& [id, record] : records_) ids.push_back(id);
    work_arrived_.NotifyAll();
  }
  int32_t num_cut = 0;
  for (JobId id : ids) num_cut += Stop(id, StopReason::kShutdown) ? 1 : 0;
  return num_cut;
}

// ---- the thread

bool Executor::WaitForWork() {
  MutexLock lock(mutex_);
  while (records_.empty() && !shut_down_) work_arrived_.Wait(mutex_);
  return !records_.empty();
}

ExecutorThread::ExecutorThread(Executor& executor, std::function<void()> after_step)
    : executor_(executor), after_step_(std::move(after_step)), thread_([this] {
        while (executor_.WaitForWork()) {
          executor_.RunOneStep();
          if (after_step_) after_step_();
        }
      }) {}

ExecutorThread::~ExecutorThread() {
  executor_.Shutdown();
  thread_.join();
}

}  // namespace pbs::server
