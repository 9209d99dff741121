// One prefill as a job: every layer is a step.
//
// The job's HeldKv is published layer by layer and finished before the listener hears
// of the end, whatever the end is.
//
// Threading: as Job. Memory: the workspace is allocated at the first step, inside what
// the job's reservation has charged.
#pragma once

#include <memory>
#include <vector>

#include "server/base/clock.h"
#include "server/base/mutex.h"
#include "server/engine/cost_model.h"
#include "server/engine/engine.h"
#include "server/engine/job.h"
#include "server/engine/kv_window.h"
#include "server/model/prefill.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

// The rows whose logits a prefill computes: the asked positions, then the last token.
std::vector<int32_t> LogitRows(const PrefillJob& job);

// Host memory for the logits of one row: the copy and its sorting.
int64_t LogitScratchBytes(const Model& model);

CostKey PrefillCostKey(const ServedModel& model, const AttentionOptions& attention);
Work PrefillWork(int32_t num_tokens);

class PrefillTask final : public Job, private PrefillObserver {
 public:
  // Borrowed; all must outlive the task.
  struct Parts {
    const Model& model;  // the job's, on the device where it runs
    CostModel& costs;
    EngineMetrics& metrics;
    const Clock& clock;
  };

  // `plan` is that of the job, with LogitRows().
  PrefillTask(const Parts& parts, PrefillJob job, PrefillPlan plan,
              PrefillListener& listener);

  void Start(const JobTiming& timing) override;
  absl::StatusOr<StepResult> Step(const RunControl& control) override;
  void Finish(const absl::Status& status) override;

 private:
  void OnKvReady(int32_t layer) override;
  // The layer is in the job's HeldKv. From the executor's thread or the backend's.
  void OnHeld(int32_t layer);
  void OnLayerDone(const LayerReport& report) override;

  absl::Status Begin();
  absl::Status ReadResult();
  absl::Status ReadRow(int32_t row, std::vector<float>& logits,
                       std::vector<ScoredToken>* best);
  void Measure();
  double SecondsSinceAdmission() const;

  const Parts parts_;
  PrefillJob job_;
  const PrefillPlan plan_;
  PrefillListener& listener_;
  JobTiming timing_;
  Buffer workspace_;
  std::unique_ptr<KvWindow> window_;  // where device memory is not ordinary memory
  std::unique_ptr<PrefillRun> run_;
  PrefillResult result_;
  Mutex listener_mutex_;  // calls come one at a time
};

}  // namespace pbs::server
