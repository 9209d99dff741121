// Attention on a device: plans on the host, enqueues, reads reports.
#pragma once

#include <memory>

#include "cuda/backend/driver.h"
#include "cuda/backend/report_slots.h"
#include "cuda/backend/staged_copies.h"
#include "pbs/attention.h"

namespace pbs::cuda {

// As AttentionBackend. The driver and the copies must outlive it.
class CudaAttention final : public AttentionBackend {
 public:
  static StatusOr<std::unique_ptr<CudaAttention>> Create(Driver& driver,
                                                         StagedCopies& copies);

  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override;
  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override;
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override;
  Status StartReport(const AttentionPlan& plan, Workspace workspace) override;
  Status FinishReport(const AttentionPlan& plan, AttentionReport* report) override;

 private:
  CudaAttention(Driver& driver, StagedCopies& copies)
      : driver_(driver), copies_(copies) {}

  Driver& driver_;
  StagedCopies& copies_;
  std::unique_ptr<ReportSlots> reports_;
};

}  // namespace pbs::cuda
