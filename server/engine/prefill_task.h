// One prefill as a job. Every layer is a step. On a device with memory of its own a
// step enqueues one layer and waits for the layer before it.
//
// The job publishes its HeldKv layer by layer, and finishes it before the listener's
// OnDone(), also after an error. Short prompts may share a run (prefill_group.h); stage
// times are then those of the run, and densities those of all its prompts.
//
// Threading: as Job. Memory: as its group.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "server/base/clock.h"
#include "server/engine/cost_model.h"
#include "server/engine/engine.h"
#include "server/engine/job.h"
#include "server/engine/prefill_group.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

// The rows whose logits a prefill computes: the requested positions, then the last
// token.
std::vector<int32_t> LogitRows(std::vector<int32_t> logit_positions,
                               int32_t num_tokens);

// Host memory to copy and sort the logits of one row.
int64_t LogitScratchBytes(const Model& model);

CostKey PrefillCostKey(const ServedModel& model, const AttentionOptions& attention,
                       std::span<const float> head_thresholds = {});
Work PrefillWork(int32_t num_tokens);

// Limits of prompts that run as one batch.
struct BatchLimits {
  int32_t tokens_max = 1;         // sum over the batch; 1: every prompt runs alone
  int32_t prompt_tokens_max = 1;  // limit of each prompt
};

// True when a prompt may share a run; its reservation then covers that.
bool MayShareRun(const BatchLimits& limits, int32_t num_tokens,
                 const AttentionOptions& attention);

class PrefillTask final : public Job, private PrefillGroup::Prompt {
 public:
  // Borrowed; all must outlive the task.
  struct Parts {
    const Model& model;  // the job's, on the device where it runs
    CostModel& costs;
    EngineMetrics& metrics;
    const Clock& clock;
    BatchLimits batch = {};
  };

  PrefillTask(const Parts& parts, PrefillJob job, PrefillListener& listener);

  int32_t batch_tokens() const override;
  BatchKey batch_key() const override;
  bool RunWith(std::span<Job* const> others) override;
  void Start(const JobTiming& timing) override;
  absl::StatusOr<StepResult> Step(const RunControl& control) override;
  void SetAside() override;
  void Finish(const absl::Status& status) override;

 private:
  std::span<const int32_t> tokens() const override { return job_.tokens; }
  HeldKv& held() override { return *job_.kv; }
  void OnHeld(int32_t layer) override;
  void OnLayerDone(const LayerReport& report, bool is_first) override;
  void OnLogits() override;
  void OnRunDone(bool is_first) override;

  void RunAlone();
  absl::Status ReadResult();
  absl::Status ReadRow(int32_t row, std::vector<float>& logits,
                       std::vector<TokenScore>* best);
  void Measure();
  // Measures the work that the prompts of a run share.
  void MeasureRun();
  double SecondsSinceAdmission() const;

  const Parts parts_;
  PrefillJob job_;
  // Plan of this prompt alone; until there is a group
  std::optional<PrefillPlan> plan_;
  const AttentionOptions attention_;
  const std::span<const float> head_thresholds_;
  PrefillListener& listener_;
  JobTiming timing_;
  std::shared_ptr<PrefillGroup> group_;
  int32_t first_logit_row_ = 0;  // in the group's plan
  Work run_work_;                // work of the group
  PrefillResult result_;
  absl::Status status_;  // error of this prompt in a run that succeeded
};

}  // namespace pbs::server
