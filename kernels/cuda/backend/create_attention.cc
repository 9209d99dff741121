#include <memory>
#include <utility>

#include "cuda/backend/attention_variants.h"
#include "cuda/backend/cuda_attention.h"
#include "cuda/backend/cuda_driver.h"
#include "cuda/backend/staged_copies.h"
#include "pbs/cuda_attention.h"

namespace pbs {
namespace {

// Attention alone, with what it needs below.
class OwningCudaAttention final : public AttentionBackend {
 public:
  static StatusOr<std::unique_ptr<AttentionBackend>> Create(
      const CudaAttentionOptions& options, cuda::AttentionVariant variant) {
    auto attention = std::make_unique<OwningCudaAttention>();
    PBS_ASSIGN_OR_RETURN(attention->driver_, cuda::CreateCudaDriver({
                                                 .device = options.device,
                                                 .stream = options.stream,
                                                 .attention = variant,
                                             }));
    PBS_ASSIGN_OR_RETURN(
        attention->copies_,
        cuda::StagedCopies::Create(*attention->driver_, cuda::StreamId::kCompute));
    PBS_ASSIGN_OR_RETURN(
        attention->attention_,
        cuda::CudaAttention::Create(*attention->driver_, *attention->copies_));
    return std::unique_ptr<AttentionBackend>(std::move(attention));
  }

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

 private:
  std::unique_ptr<cuda::Driver> driver_;
  std::unique_ptr<cuda::StagedCopies> copies_;
  std::unique_ptr<cuda::CudaAttention> attention_;
};

}  // namespace

StatusOr<std::unique_ptr<AttentionBackend>> CreateCudaAttention(
    const CudaAttentionOptions& options) {
  return cuda::CreateAttentionVariant(options, cuda::AttentionVariant::kChosen);
}

StatusOr<std::unique_ptr<AttentionBackend>> cuda::CreateAttentionVariant(
    const CudaAttentionOptions& options, AttentionVariant variant) {
  return OwningCudaAttention::Create(options, variant);
}

}  // namespace pbs
