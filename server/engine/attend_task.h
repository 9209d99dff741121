// One raw attention as a job: every warm-up run and every repetition is a step.
//
// Threading: as Job. Memory: the job's tensors; outputs and workspace are allocated at
// the first step, inside what the job's reservation has charged. On a device with
// memory of its own inputs, and what was charged for them, are an upload's
// (device_uploads.h).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "pbs/backend.h"
#include "server/base/clock.h"
#include "server/engine/cost_model.h"
#include "server/engine/device_tensors.h"
#include "server/engine/device_uploads.h"
#include "server/engine/engine.h"
#include "server/engine/job.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

// What an Attend holds at its peak, part by part.
struct AttendBytes {
  int64_t inputs = 0;  // q, k, v; given order and lists
  int64_t workspace = 0;
  int64_t outputs = 0;  // o; wanted lse, order and lists (worst case)
  // What a report reads of a device's workspace before it makes order and lists of it.
  int64_t read_back = 0;

  int64_t Total() const { return inputs + workspace + outputs; }
  // Of which host memory holds all but the workspace, too, where a device has memory of
  // its own.
  int64_t Tensors() const { return inputs + outputs; }
};

struct AttendWanted {
  bool lse = false, order = false, lists = false;
};

AttendBytes BytesOfAttend(const AttentionPlan& plan, const AttendWanted& wanted);

// Warm-ups and repetitions.
int32_t NumRuns(const AttendJob& job);

// The key and the size of its work for the cost model.
CostKey AttendCostKey(const AttentionProblem& problem);
Work AttendWork(const AttentionGeometry& geometry, int32_t runs);

class AttendTask final : public Job {
 public:
  // Borrowed; all must outlive the task.
  struct Parts {
    Backend& backend;
    CostModel& costs;
    EngineMetrics& metrics;
    const Clock& clock;
    DeviceUploads* uploads = nullptr;  // where device memory is not ordinary memory
  };

  // `plan` is the backend's for job.problem.
  AttendTask(const Parts& parts, AttendJob job, std::unique_ptr<AttentionPlan> plan,
             AttendListener& listener);

  void Start(const JobTiming& timing) override;
  absl::StatusOr<StepResult> Step(const RunControl& control) override;
  void Finish(const absl::Status& status) override;

  // Of the inputs, which wait for its Begin() or the first step. Requires `uploads`.
  UploadId upload_id() const { return DeviceUploads::IdOf(upload_); }

 private:
  UploadSource TakeInputs();
  absl::Status Allocate(const RunControl& control);
  absl::Status RunOnce(const RunControl& control, bool is_last);
  AttentionTensors HostTensors();
  void Measure();

  const Parts parts_;
  AttendJob job_;
  AttentionTensors inputs_;  // in host memory
  const std::unique_ptr<AttentionPlan> plan_;
  AttendListener& listener_;
  const int32_t num_runs_;
  int32_t runs_done_ = 0;
  double run_seconds_ = 0;  // of all runs
  Buffer workspace_;
  DeviceUploads::Handle upload_;         // with `uploads`
  std::optional<DeviceTensors> device_;  // with `uploads`
  AttendResult result_;
};

}  // namespace pbs::server
