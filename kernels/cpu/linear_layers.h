// Linear layers of the CPU backend: weights cut into panels, one job per panel.
//
// Weights stay in memory as they were stored, in panel order. Where the compute dtype
// is wider (bf16 or f16 weights that multiply as f32), a job widens its panel into
// scratch first; spread over the rows of a call that costs about 1 % and it halves
// memory. The result equals multiplying a widened copy, bit for bit.
//
// Threading: as Backend. Memory: Run() uses its workspace; each worker has a slice.
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
  // Products are shared by all layers of equal shape.
  StatusOr<const MatmulKernels*> KernelsFor(DType operands, int64_t depth, int64_t cols,
                                            int64_t x_stride);

  ThreadPool& pool_;
  const PointwiseKernels& pointwise_;
  dnnl::engine engine_;
  std::map<std::tuple<DType, int64_t, int64_t, int64_t>, std::unique_ptr<MatmulKernels>>
      kernels_;
};

}  // namespace pbs::cpu
