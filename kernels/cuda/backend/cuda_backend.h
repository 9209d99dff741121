// pbs::Backend on a CUDA device: combines memory, linear layers, pointwise steps and
// attention.
//
// The contract for callers is in pbs/cuda_backend.h.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <utility>

#include "cuda/backend/cuda_attention.h"
#include "cuda/backend/driver.h"
#include "cuda/backend/later_copies.h"
#include "cuda/backend/staged_copies.h"
#include "pbs/backend.h"

namespace pbs::cuda {

class CudaBackend final : public Backend {
 public:
  static StatusOr<std::unique_ptr<CudaBackend>> Create(std::unique_ptr<Driver> driver);
  ~CudaBackend() override;

  const BackendInfo& info() const override { return info_; }
  Status Health() override { return driver_->Health(); }
  DType ComputeDType(DType stored) const override;

  StatusOr<Buffer> Allocate(int64_t bytes) override;
  Status Upload(const void* source, void* target, int64_t bytes) override;
  Status Download(const void* source, void* target, int64_t bytes) override;
  StatusOr<Buffer> AllocateHost(int64_t bytes) override;
  StatusOr<Buffer> AllocateForUpload(int64_t bytes) override {
    return AllocateAny(StreamId::kUpload, bytes);
  }
  void UploadLater(const void* source, void* target, int64_t bytes,
                   std::function<void(const Status&)> done) override {
    uploads_->Add(source, target, bytes, std::move(done));
  }
  void DownloadLater(const void* source, void* target, int64_t bytes,
                     std::function<void(const Status&)> done) override {
    downloads_->Add(source, target, bytes, std::move(done));
  }

  StatusOr<std::unique_ptr<PackedLinear>> PackLinear(
      const LinearSpec& spec, const RowReader& read,
      std::span<const float> bias) override;
  int64_t LinearWorkspaceBytes(const PackedLinear& linear, int64_t rows) const override;
  Status Linear(const PackedLinear& linear, const void* x, int64_t rows, void* y,
                Workspace workspace) override;

  Status Embed(const EmbedOp& op) override { return driver_->Embed(op); }
  Status Rotations(const RotationsOp& op) override { return driver_->Rotations(op); }
  Status RmsNorm(const RmsNormOp& op) override { return driver_->RmsNorm(op); }
  Status Qkv(const QkvOp& op) override { return driver_->Qkv(op); }
  Status Logits(const LogitsOp& op) override { return driver_->Logits(op); }
  Status CopyRows(const CopyRowsOp& op) override { return driver_->CopyRows(op); }

  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override {
    return attention_->Plan(problem);
  }
  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override {
    return attention_->Run(plan, tensors, workspace, control);
  }
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override {
    return attention_->ReadReport(plan, workspace, request, report);
  }
  Status StartReport(const AttentionPlan& plan, Workspace workspace) override {
    return attention_->StartReport(plan, workspace);
  }
  Status FinishReport(const AttentionPlan& plan, AttentionReport* report) override {
    return attention_->FinishReport(plan, report);
  }

  Status MarkTime(int mark) override;
  StatusOr<double> SecondsBetween(int from, int to) override;

 private:
  explicit CudaBackend(std::unique_ptr<Driver> driver);
  // Memory of unspecified contents, for work on `stream` to fill.
  StatusOr<Buffer> AllocateAny(StreamId stream, int64_t bytes);

  const std::unique_ptr<Driver> driver_;
  BackendInfo info_;
  std::unique_ptr<StagedCopies> copies_;
  std::unique_ptr<CudaAttention> attention_;
  std::array<EventId, kTimeMarks> marks_{};
  // Last members, so that their threads end first.
  std::unique_ptr<LaterCopies> downloads_;
  std::unique_ptr<LaterCopies> uploads_;
};

}  // namespace pbs::cuda
