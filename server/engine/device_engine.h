// What the engine is on one device: one of its replicas.
//
//   Reserve*: plan and charge       Submit*: predict, hand to the executor
//
// Threading and memory: as Engine. The backend is used by the executor's thread; from
// other threads only to plan, to allocate and to upload, which every backend allows.
// The destructor waits for uploads under way.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "pbs/backend.h"
#include "server/base/clock.h"
#include "server/base/timers.h"
#include "server/engine/attend_task.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/cost_model.h"
#include "server/engine/device_uploads.h"
#include "server/engine/engine.h"
#include "server/engine/executor.h"
#include "server/engine/prefill_task.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

// Borrowed; all must outlive the engine. `metrics.kv` counts held caches and must
// outlive those too. Replicas have their own backend and device ledger and share the
// rest.
struct EngineParts {
  Backend& backend;
  ByteLedger& ledger;
  const Clock& clock;
  TimerQueue& timers;
  ServerMetrics& metrics;
  CostModel& costs;
  // Ledger of the device's own memory; null where that is ordinary memory.
  ByteLedger* device_ledger = nullptr;
  int32_t replica = 0;
};

struct EngineOptions {
  int32_t queue_requests_max = 0;  // waiting
  double yield_share = 0;          // as ExecutorOptions::yield_share
  BatchLimits batch = {};
  // Caches are held in shared memory. Not where the device has memory of its own.
  bool shared_caches = false;
};

class DeviceEngine {
 public:
  DeviceEngine(const EngineOptions& options, const EngineParts& parts);

  // An ExecutorThread runs it; a test calls RunOneStep() itself.
  Executor& executor() { return executor_; }

  // Accepted and unfinished work, and bytes that the ledgers have charged.
  struct Load {
    Backlog backlog;
    int64_t device_bytes_held = 0;
  };
  Load load() const;

  // As those of Engine. A refusal is not counted, because another replica may accept
  // the job, and bytes that could never fit are OutOfRange.
  absl::StatusOr<AttendReservation> ReserveAttend(const AttentionProblem& problem,
                                                  const AttendWanted& wanted);
  absl::StatusOr<PrefillReservation> ReservePrefill(const ServedModel& model,
                                                    const PrefillNeeds& needs);

  // As those of Engine.
  std::optional<double> PredictPrefill(const ServedModel& model, int32_t num_tokens,
                                       const AttentionOptions& attention,
                                       std::span<const float> head_thresholds,
                                       const JobTerms& terms) const;
  absl::StatusOr<Admission> SubmitAttend(AttendJob job, AttendListener& listener);
  absl::StatusOr<Admission> SubmitPrefill(PrefillJob job, PrefillListener& listener);
  void Cancel(JobId id, CancelReason reason) { executor_.Cancel(id, reason); }
  void Drain(absl::AnyInvocable<void()> on_idle) {
    executor_.Drain(std::move(on_idle));
  }

 private:
  const Model& ReplicaOf(const ServedModel& served) const;
  JobSize SizeOfPrefill(const ServedModel& model, int32_t num_tokens,
                        const AttentionOptions& attention,
                        std::span<const float> head_thresholds) const;
  bool has_device_memory() const { return parts_.device_ledger != nullptr; }
  absl::StatusOr<std::shared_ptr<HeldKv>> Hold(const KvShape& shape,
                                               CapturedQueries queries,
                                               ByteReservation bytes);

  const EngineParts parts_;
  const BatchLimits batch_;
  const bool shared_caches_;
  std::optional<DeviceUploads> uploads_;  // with a device ledger
  Executor executor_;                     // before `uploads_` ends, all jobs have
};

}  // namespace pbs::server
