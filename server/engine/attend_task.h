// One raw attention as a job. Every warm-up run and every repetition is a step.
//
// Threading: as Job. Memory: the job's tensors. The first step allocates outputs and
// workspace, within the job's reservation. On a device with memory of its own an upload
// (device_uploads.h) owns the inputs and their charge.
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

// Peak memory of an Attend, in bytes by part.
struct AttendBytes {
  int64_t inputs = 0;  // q, k, v; given order and lists
  int64_t workspace = 0;
  int64_t outputs = 0;  // o; wanted lse, order and lists (worst case)
  // Parts of a device's workspace that a report copies to the host to make order and
  // lists.
  int64_t read_back = 0;

  int64_t Total() const { return inputs + workspace + outputs; }
  // Bytes of tensors. Where a device has memory of its own, the host holds them too.
  int64_t Tensors() const { return inputs + outputs; }
};

AttendBytes BytesOfAttend(const AttentionPlan& plan, const AttendWanted& wanted);

// Number of warm-ups and repetitions together.
int32_t NumRuns(const AttendJob& job);

// The key of the cost model for this work.
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
    DeviceUploads* uploads = nullptr;  // null where device memory is ordinary memory
  };

  AttendTask(const Parts& parts, AttendJob job, AttendListener& listener);

  void Start(const JobTiming& timing) override;
  absl::StatusOr<StepResult> Step(const RunControl& control) override;
  void Finish(const absl::Status& status) override;

  // The upload of the inputs, which begins at DeviceUploads::Begin() or at the first
  // step. Requires `uploads`.
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
  double run_seconds_ = 0;  // sum over all runs
  Buffer workspace_;
  DeviceUploads::Handle upload_;         // with `uploads`
  std::optional<DeviceTensors> device_;  // with `uploads`
  AttendResult result_;
};

}  // namespace pbs::server
