// Linear layers of the CPU backend: weights cut into panels, one job per panel.
//
// Weights stay in memory in their stored dtype, in panel order. Where the compute dtype
// is wider (bf16 or f16 weights that are multiplied as f32), a job first widens its
// panel into scratch. That halves memory and costs about 1 % of a call. The result
// equals that of a widened weight bit for bit.
//
// Threading: as Backend. Memory: Run() uses its workspace, of which each worker has a
// part.
#pragma once

#include <cstdint>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

#include "cpu/linear_matmul.h"
#include "cpu/pointwise_kernels.h"
#include "cpu/thread_pool.h"
#include "pbs/backend.h"

namespace pbs::cpu {

class LinearLayers {
 public:
  LinearLayers(ThreadPool& pool, const PointwiseKernels& pointwise);

  // As Backend::PackLinear(), LinearWorkspaceBytes(), Linear().
  StatusOr<std::unique_ptr<PackedLinear>> Pack(const LinearSpec& spec,
                                               const RowReader& read,
                                               std::span<const float> bias);
  int64_t WorkspaceBytes(const PackedLinear& linear) const;
  Status Run(const PackedLinear& linear, const void* x, int64_t rows, void* y,
             Workspace workspace);

 private:
  // All layers of equal shape share their products.
  StatusOr<const MatmulKernels*> KernelsFor(DType operands, int64_t depth, int64_t cols,
                                            int64_t x_stride);

  ThreadPool& pool_;
  const PointwiseKernels& pointwise_;
  dnnl::engine engine_;
  std::map<std::tuple<DType, int64_t, int64_t, int64_t>, std::unique_ptr<MatmulKernels>>
      kernels_;
};

}  // namespace pbs::cpu
