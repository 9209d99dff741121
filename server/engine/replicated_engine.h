// One engine over several, each on a device of its own with a replica of every model.
//
// A job goes to the replica with the least predicted backlog (then with the fewest
// jobs, then with the fewest device bytes charged), or, where that has no room, to the
// next. It is chosen when its memory is reserved and stays there, also when that
// replica's queue turns out to be full. What is reserved and not submitted counts as
// bytes only.
//
// Threading: as Engine. Memory: none of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "server/engine/engine.h"
#include "server/engine/engine_impl.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

class ReplicatedEngine final : public Engine {
 public:
  // `replicas` in the order of their numbers (EngineParts::replica), at least one;
  // borrowed.
  ReplicatedEngine(std::vector<EngineImpl*> replicas, EngineMetrics& metrics);

  absl::StatusOr<JobReservation> ReserveAttend(const AttentionProblem& problem,
                                               bool want_lse, bool want_order,
                                               bool want_lists) override;
  absl::StatusOr<PrefillReservation> ReservePrefill(const ServedModel& model,
                                                    int32_t num_tokens,
                                                    const AttentionOptions& attention,
                                                    int32_t num_logit_rows,
                                                    int64_t reply_bytes) override;
  absl::StatusOr<Admission> SubmitAttend(AttendJob job,
                                         AttendListener& listener) override;
  absl::StatusOr<Admission> SubmitPrefill(PrefillJob job,
                                          PrefillListener& listener) override;
  void Cancel(JobId id, CancelReason reason) override;
  void Drain(absl::AnyInvocable<void()> on_idle) override;

  // As Executor::Shutdown(), of all.
  int32_t Shutdown();

 private:
  // The least loaded first.
  std::vector<EngineImpl*> ByLoad() const;
  // Of the first replica that has room. Without one: ResourceExhausted where some
  // replica may have room later.
  template <class Reservation, class Reserve>
  absl::StatusOr<Reservation> ReserveSomewhere(const Reserve& reserve);
  // Ids are unique over all replicas: id = theirs * replicas + replica.
  absl::StatusOr<Admission> WithId(absl::StatusOr<Admission> admission,
                                   int32_t replica) const;

  const std::vector<EngineImpl*> replicas_;
  EngineMetrics& metrics_;
};

}  // namespace pbs::server
