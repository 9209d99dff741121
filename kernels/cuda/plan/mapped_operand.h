// Operands of attention in the form of Hopper's tensor maps.
#pragma once

#include <array>
#include <cstdint>

#include "cuda/plan/cuda_plan.h"
#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

// 16-bit elements [sequences, heads, rows, width], and the box of 64 columns that one
// copy moves. An operand with packed sequences is described as one sequence of all
// their rows.
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

// Strides of the dimensions after the first, in bytes. A dimension of one element gets
// the stride of contiguous elements of the dimension before it: the stride is never
// used, but the driver requires a valid one.
std::array<uint64_t, 3> MapStrides(const MappedOperand& mapped);

struct MappedOperands {
  MappedOperand q, k, v, o;
};
MappedOperands MapOperands(const CudaAttentionPlan& plan, const RunParams& run);

}  // namespace pbs::cuda
