// Attention on the CPU: packed operands, register-tiled products, online softmax.
//
// Steps for each wave of units (attention_plan.h): score keys against the last query
// block, sort them inside segments, pack keys and values in that order, pool and select
// blocks, attend. docs/KERNELS.md, "CPU", has the arithmetic.
//
// Threading: one Run() at a time. Memory: Run() uses only the workspace.
#pragma once

#include <deque>
#include <memory>

#include "cpu/isa.h"
#include "cpu/packing.h"
#include "cpu/thread_pool.h"
#include "pbs/attention.h"

namespace pbs::cpu {

// The table of `isa`. Call its functions only when IsSupported(isa).
const TileKernels& KernelsFor(Isa isa);

class CpuAttention final : public AttentionBackend {
 public:
  // Requires IsSupported(isa). With `use_pairs`, bf16 operands are multiplied as pairs
  // where the table has that product, which is not faster on every CPU.
  CpuAttention(ThreadPool& pool, Isa isa, bool use_pairs);

  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override;
  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override;
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override;
  Status StartReport(const AttentionPlan& plan, Workspace workspace) override;
  Status FinishReport(const AttentionPlan& plan, AttentionReport* report) override;

 private:
  ThreadPool& pool_;
  const TileKernels& kernels_;
  const bool use_pairs_;
  std::deque<AttentionReport> under_way_;  // read by StartReport()
};

}  // namespace pbs::cpu
