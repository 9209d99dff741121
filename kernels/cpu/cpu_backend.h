// The CPU backend's composition: threads, attention, linear layers, pointwise steps.
//
// pbs/cpu_backend.h has the contract for callers.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "cpu/cpu_attention.h"
#include "cpu/isa.h"
#include "cpu/linear_layers.h"
#include "cpu/pointwise_kernels.h"
#include "cpu/thread_pool.h"
#include "pbs/backend.h"

namespace pbs::cpu {

class CpuBackend final : public Backend {
 public:
  // Requires IsSupported(isa). `bf16_products` multiplies bf16 weights as bf16.
  CpuBackend(int32_t num_threads, Isa isa, bool bf16_products, double bf16_speedup);

  const BackendInfo& info() const override { return info_; }
  DType ComputeDType(DType stored) const override;

  StatusOr<Buffer> Allocate(int64_t bytes) override;
  Status Upload(const void* source, void* target, int64_t bytes) override;
  Status Download(const void* source, void* target, int64_t bytes) override;
  StatusOr<Buffer> AllocateHost(int64_t bytes) override { return Allocate(bytes); }
  StatusOr<Buffer> AllocateForUpload(int64_t bytes) override { return Allocate(bytes); }
  void UploadLater(const void* source, void* target, int64_t bytes,
                   std::function<void(const Status&)> done) override {
    done(bytes == 0 ? OkStatus() : Upload(source, target, bytes));
  }
  void DownloadLater(const void* source, void* target, int64_t bytes,
                     std::function<void(const Status&)> done) override {
    done(Download(source, target, bytes));
  }

  StatusOr<std::unique_ptr<PackedLinear>> PackLinear(
      const LinearSpec& spec, const RowReader& read,
      std::span<const float> bias) override;
  int64_t LinearWorkspaceBytes(const PackedLinear& linear, int64_t rows) const override;
  Status Linear(const PackedLinear& linear, const void* x, int64_t rows, void* y,
                Workspace workspace) override;

  Status Embed(const EmbedOp& op) override;
  Status Rotations(const RotationsOp& op) override;
  Status RmsNorm(const RmsNormOp& op) override;
  Status Qkv(const QkvOp& op) override;
  Status Logits(const LogitsOp& op) override;
  Status CopyRows(const CopyRowsOp& op) override;

  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override;
  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override;
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override;
  Status StartReport(const AttentionPlan& plan, Workspace workspace) override;
  Status FinishReport(const AttentionPlan& plan, AttentionReport* report) override;

  Status MarkTime(int mark) override;
  StatusOr<double> SecondsBetween(int from, int to) override;

 private:
  ThreadPool pool_;
  const PointwiseKernels& pointwise_;
  const bool bf16_products_;
  LinearLayers linear_;
  CpuAttention attention_;
  BackendInfo info_;
  std::array<std::chrono::steady_clock::time_point, kTimeMarks> marks_;
};

}  // namespace pbs::cpu
