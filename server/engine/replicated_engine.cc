#include "server/engine/replicated_engine.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>

#include "pbs/check.h"
#include "server/base/mutex.h"

namespace pbs::server {

namespace {

// Counts a refused reservation and changes its code OutOfRange to InvalidArgument.
absl::Status CountRefusal(EngineMetrics& metrics, const absl::Status& status) {
  if (absl::IsResourceExhausted(status)) {
    metrics.Rejected(RejectReason::kMemory).Increment();
  }
  if (!absl::IsOutOfRange(status)) return status;
  metrics.Rejected(RejectReason::kTooLarge).Increment();
  return absl::InvalidArgumentError(status.message());
}

}  // namespace

ReplicatedEngine::ReplicatedEngine(std::vector<DeviceEngine*> replicas,
                                   EngineMetrics& metrics)
    : replicas_(std::move(replicas)), metrics_(metrics) {
  PBS_CHECK(!replicas_.empty());
}

std::vector<DeviceEngine*> ReplicatedEngine::ByLoad() const {
  using Key = std::tuple<double, int32_t, int64_t>;
  std::vector<std::pair<Key, DeviceEngine*>> loads;
  for (DeviceEngine* replica : replicas_) {
    const DeviceEngine::Load load = replica->load();
    loads.push_back(
        {{load.backlog.seconds, load.backlog.jobs, load.device_bytes_held}, replica});
  }
  std::stable_sort(loads.begin(), loads.end(), [](const auto& left, const auto& right) {
    return left.first < right.first;
  });
  std::vector<DeviceEngine*> sorted;
  for (const auto& [key, replica] : loads) sorted.push_back(replica);
  return sorted;
}

template <class Reservation, class Reserve>
absl::StatusOr<Reservation> ReplicatedEngine::ReserveSomewhere(const Reserve& reserve) {
  absl::Status refusal;
  for (DeviceEngine* replica : ByLoad()) {
    absl::StatusOr<Reservation> reserved = reserve(*replica);
    if (reserved.ok()) return reserved;
    if (refusal.ok() || absl::IsResourceExhausted(reserved.status())) {
      refusal = reserved.status();
    }
    const bool for_room = absl::IsResourceExhausted(reserved.status()) ||
                          absl::IsOutOfRange(reserved.status());
    if (!for_room) break;
  }
  return CountRefusal(metrics_, refusal);
}

absl::StatusOr<AttendReservation> ReplicatedEngine::ReserveAttend(
    const AttentionProblem& problem, const AttendWanted& wanted) {
  return ReserveSomewhere<AttendReservation>(
      [&](DeviceEngine& replica) { return replica.ReserveAttend(problem, wanted); });
}

absl::StatusOr<PrefillReservation> ReplicatedEngine::ReservePrefill(
    const ServedModel& model, const PrefillNeeds& needs) {
  return ReserveSomewhere<PrefillReservation>(
      [&](DeviceEngine& replica) { return replica.ReservePrefill(model, needs); });
}

std::optional<double> ReplicatedEngine::PredictPrefill(
    const ServedModel& model, int32_t num_tokens, const AttentionOptions& attention,
    std::span<const float> head_thresholds, const JobTerms& terms) const {
  return ByLoad().front()->PredictPrefill(model, num_tokens, attention, head_thresholds,
                                          terms);
}

absl::StatusOr<Admission> ReplicatedEngine::WithId(absl::StatusOr<Admission> admission,
                                                   int32_t replica) const {
  if (admission.ok()) {
    admission->id = admission->id * replicas_.size() + static_cast<JobId>(replica);
  }
  return admission;
}

absl::StatusOr<Admission> ReplicatedEngine::SubmitAttend(AttendJob job,
                                                         AttendListener& listener) {
  const int32_t replica = job.reservation.replica;
  return WithId(replicas_.at(static_cast<size_t>(replica))
                    ->SubmitAttend(std::move(job), listener),
                replica);
}

absl::StatusOr<Admission> ReplicatedEngine::SubmitPrefill(PrefillJob job,
                                                          PrefillListener& listener) {
  const int32_t replica = job.reservation.replica;
  return WithId(replicas_.at(static_cast<size_t>(replica))
                    ->SubmitPrefill(std::move(job), listener),
                replica);
}

void ReplicatedEngine::Cancel(JobId id, CancelReason reason) {
  const auto count = static_cast<JobId>(replicas_.size());
  replicas_[static_cast<size_t>(id % count)]->Cancel(id / count, reason);
}

void ReplicatedEngine::Drain(absl::AnyInvocable<void()> on_idle) {
  // shared_ptr: the last replica to become idle calls back.
  struct Waiting {
    Mutex mutex;
    size_t replicas ABSL_GUARDED_BY(mutex) = 0;
    absl::AnyInvocable<void()> on_idle;
  };
  const auto waiting = std::make_shared<Waiting>();
  waiting->on_idle = std::move(on_idle);
  {
    MutexLock lock(waiting->mutex);
    waiting->replicas = replicas_.size();
  }
  for (DeviceEngine* replica : replicas_) {
    replica->Drain([waiting] {
      {
        MutexLock lock(waiting->mutex);
        if (--waiting->replicas > 0) return;
      }
      waiting->on_idle();
    });
  }
}

int32_t ReplicatedEngine::Shutdown() {
  int32_t cut = 0;
  for (DeviceEngine* replica : replicas_) cut += replica->executor().Shutdown();
  return cut;
}

}  // namespace pbs::server
