// One engine over several, each on a device of its own with a replica of every model.
//
// A job goes to the replica with the least predicted backlog (of equals, the fewest
// jobs, then the fewest charged device bytes). Where that replica has too little
// memory, it goes to the next one. The choice is made when the job's memory is
// reserved, and it is final, also when that replica's queue is full later. A reserved
// job that is not yet submitted counts only by its bytes.
//
// Threading: as Engine. Memory: none of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "server/engine/device_engine.h"
#include "server/engine/engine.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

class ReplicatedEngine final : public Engine {
 public:
  // `replicas` in the order of their numbers (EngineParts::replica), at least one;
  // borrowed.
  ReplicatedEngine(std::vector<DeviceEngine*> replicas, EngineMetrics& metrics);

  absl::StatusOr<AttendReservation> ReserveAttend(const AttentionProblem& problem,
                                                  const AttendWanted& wanted) override;
  absl::StatusOr<PrefillReservation> ReservePrefill(const ServedModel& model,
                                                    const PrefillNeeds& needs) override;
  std::optional<double> PredictPrefill(const ServedModel& model, int32_t num_tokens,
                                       const AttentionOptions& attention,
                                       std::span<const float> head_thresholds,
                                       const JobTerms& terms) const override;
  absl::StatusOr<Admission> SubmitAttend(AttendJob job,
                                         AttendListener& listener) override;
  absl::StatusOr<Admission> SubmitPrefill(PrefillJob job,
                                          PrefillListener& listener) override;
  void Cancel(JobId id, CancelReason reason) override;
  void Drain(absl::AnyInvocable<void()> on_idle) override;

  // As Executor::Shutdown(), for all replicas.
  int32_t Shutdown();

 private:
  // The replicas, least loaded first.
  std::vector<DeviceEngine*> ByLoad() const;
  // Reserves at the first replica that has the memory. If none has: ResourceExhausted
  // when some replica may have it later.
  template <class Reservation, class Reserve>
  absl::StatusOr<Reservation> ReserveSomewhere(const Reserve& reserve);
  // Makes job ids unique over all replicas: id = the replica's id * replicas + replica.
  absl::StatusOr<Admission> WithId(absl::StatusOr<Admission> admission,
                                   int32_t replica) const;

  const std::vector<DeviceEngine*> replicas_;
  EngineMetrics& metrics_;
};

}  // namespace pbs::server
