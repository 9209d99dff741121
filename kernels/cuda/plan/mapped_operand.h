// Operands of attention as Hopper's copy engine must know them (tensor maps).
#pragma once

#include <array>
#include <cstdint>

#include "cuda/plan/cuda_plan.h"
#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

// 16-bit elements [sequences, heads, rows, width] and the box of 64 columns that a copy
// moves. An operand whose sequences are packed is one sequence of all their rows.
struct MappedOperand {
  RowOperand operand;
  int64_t width = 0;
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t sequences = 0;
  int32_t box_rows = 0;
  bool bf16 = true;

  bool operator==(const MappedOperand&) const = default;
};

// Strides of the dimensions behind the first, in bytes. A dimension of one element has
// the stride that it would have if the elements of the one before it lay side by side:
// nothing is read by it, but the driver wants strides that can be.
std::array<uint64_t, 3> MapStrides(const MappedOperand& mapped);

struct MappedOperands {
  MappedOperand q, k, v, o;
};
MappedOperands MapOperands(const CudaAttentionPlan& plan, const RunParams& run);

}  // namespace pbs::cuda
