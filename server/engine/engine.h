// The engine admits work, decides which job runs next, runs it and completes it once.
//
//   Submit -> bounded queue -> Scheduler::Pick (pure) -> executor thread -> listener
//
// A job is a sequence of steps (a prefill: one step per layer). Between steps the
// executor checks cancellation and deadlines. Every accepted job completes exactly
// once: with a result, an error, CANCELLED or DEADLINE_EXCEEDED.
//
// Threading: all methods are safe from any thread and never block on work. The executor
// thread calls the listener. For a job that never ran, the thread that cancelled it
// calls it, or the timers' thread at its deadline. Calls come one at a time per job;
// they must not block or call back into the job. OnDone may come before Submit returns.
// A backend's thread may publish layers in the job's HeldKv.
// Memory: a job's bytes are reserved before it is accepted (ReserveAttend/-Prefill).
// The job owns the reservation, so that finishing, failing or dropping the job gives
// the bytes back. Bytes of tensors that are being copied to a device come back when the
// copies under way have ended.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "server/base/host_bytes.h"
#include "server/engine/attend_wanted.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/held_kv.h"
#include "server/engine/job_terms.h"
#include "server/engine/served_model.h"
#include "server/model/prefill_plan.h"
#include "server/model/sampling.h"

namespace pbs::server {

// Wall seconds by stage, as StageSeconds (types.proto). The engine does not know the
// stages after its work.
struct StageTimes {
  double queue = 0, embed = 0, qkv = 0, permute = 0, select = 0, attend = 0, mlp = 0;
  double copy = 0;
};

// Memory that a job may hold, charged before it is accepted.
struct JobReservation {
  ByteReservation host;
  ByteReservation device;  // empty where device memory is ordinary memory
  int32_t replica = 0;     // the replica that will run the job

  void Reset() {
    host.Reset();
    device.Reset();
  }
};

// What a job may hold, and the plan of what it runs in it.
struct AttendReservation : JobReservation {
  std::unique_ptr<AttentionPlan> plan;
};
struct PrefillWorkspace : JobReservation {
  std::optional<PrefillPlan> plan;
};

// ---- raw attention

// A tensor in host memory with its layout.
struct HostRows {
  HostBytes bytes;
  RowLayout layout;
};

struct AttendJob {
  JobTerms terms;
  AttentionProblem problem;  // as it was reserved
  HostRows q, k, v;
  HostRows order;    // with use_given_order
  BlockLists lists;  // with use_given_lists
  RowLayout o_layout, lse_layout;
  AttendWanted wanted;  // as reserved
  int32_t warmup = 0;
  int32_t repetitions = 1;
  AttendReservation reservation;  // from ReserveAttend()
};

struct AttendIteration {
  double permute_seconds = 0, select_seconds = 0, attend_seconds = 0;
};

struct AttendResult {
  HostBytes o;
  HostBytes lse;           // empty unless wanted
  AttentionReport report;  // order and lists when wanted
  std::vector<AttendIteration> iterations;
  StageTimes stages;
  ByteReservation reservation;  // shrunk to what the result holds
};

class AttendListener {
 public:
  virtual ~AttendListener() = default;
  virtual void OnDone(absl::StatusOr<AttendResult> result) = 0;
};

// ---- prefill

struct PrefillJob {
  JobTerms terms;
  const ServedModel* model = nullptr;
  std::vector<int32_t> tokens;           // valid for the model, as many as reserved
  std::vector<int32_t> logit_positions;  // as reserved
  int32_t top_logits = 0;  // k best of the last token and of logit_positions
  bool all_logits_last_token = false;
  std::shared_ptr<HeldKv> kv;    // from ReservePrefill()
  PrefillWorkspace reservation;  // from ReservePrefill()
};

struct PrefillResult {
  int32_t first_token_id = 0;
  std::vector<TokenScore> top_logits;
  std::vector<std::vector<TokenScore>> positions;  // as logit_positions
  std::vector<float> last_token_logits;            // when asked for
  std::vector<AttentionStats> layers;
  std::vector<AttentionHeads> layer_heads;  // with coverage_rows
  StageTimes stages;
  double time_to_first_layer_seconds = 0;
  double total_seconds = 0;  // admission to last layer
  // Copying keys and values from a device, in parallel with the stages
  double kv_copy_seconds = 0;
};

class PrefillListener {
 public:
  virtual ~PrefillListener() = default;
  // Attention and MLP of the layer have run. Its K and V are published in the job's
  // HeldKv, on a device perhaps a little later.
  virtual void OnLayerDone(int32_t layer, double density, double seconds) = 0;
  virtual void OnDone(absl::StatusOr<PrefillResult> result) = 0;
};

// What a prefill runs and needs memory for.
struct PrefillNeeds {
  int32_t num_tokens = 0;
  AttentionOptions attention = {};            // valid
  std::vector<int32_t> logit_positions = {};  // beside the last token
  int64_t reply_bytes = 0;                    // what the caller will hold in addition
  // Layers whose queries are captured, ascending, each below the model's layers
  std::vector<int32_t> query_layers = {};
  // PrefillProblem::head_thresholds. Those of a profile must live as long as the model,
  // others until OnDone. Prompts share a run only with one and the same.
  std::span<const float> head_thresholds = {};
};

struct PrefillReservation {
  std::shared_ptr<HeldKv> kv;
  PrefillWorkspace workspace;
  ByteReservation reply;
};

class Engine {
 public:
  virtual ~Engine() = default;

  // Plans an Attend and charges everything it needs: upload, workspace, results. Errors
  // as Backend::Plan() and ByteLedger::Reserve().
  virtual absl::StatusOr<AttendReservation> ReserveAttend(
      const AttentionProblem& problem, const AttendWanted& wanted) = 0;
  // Plans a prefill. Charges and allocates the KV cache and captured queries. Charges
  // the workspace and the reply. Errors as PlanPrefill() and ByteLedger::Reserve().
  virtual absl::StatusOr<PrefillReservation> ReservePrefill(
      const ServedModel& model, const PrefillNeeds& needs) = 0;

  // Seconds until a prefill with these terms would be done, work ahead of it included,
  // on the device that would get it now; nullopt until similar work was measured.
  // `head_thresholds` as in PrefillNeeds.
  virtual std::optional<double> PredictPrefill(const ServedModel& model,
                                               int32_t num_tokens,
                                               const AttentionOptions& attention,
                                               std::span<const float> head_thresholds,
                                               const JobTerms& terms) const = 0;

  // ResourceExhausted when the queue is full, DeadlineExceeded when the deadline has
  // passed or the backlog ahead cannot meet it, Unavailable while draining. On error
  // the listener is never called and all the job's memory is free. `listener` must live
  // until OnDone.
  virtual absl::StatusOr<Admission> SubmitAttend(AttendJob job,
                                                 AttendListener& listener) = 0;
  virtual absl::StatusOr<Admission> SubmitPrefill(PrefillJob job,
                                                  PrefillListener& listener) = 0;

  // Stops the job before its next step; it completes with the code of `reason`. No-op
  // when finished.
  virtual void Cancel(JobId id, CancelReason reason) = 0;

  // Accepts no more work; `on_idle` is called once all accepted work has completed.
  virtual void Drain(absl::AnyInvocable<void()> on_idle) = 0;
};

}  // namespace pbs::server
