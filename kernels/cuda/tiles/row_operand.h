// Layout of an operand's rows on a GPU.
#pragma once

#include <cstdint>

#include "cuda/primitives/host_device.h"

namespace pbs::cuda {

// Strides in elements. A packed operand has the sequences back to back; other operands
// have a stride between sequences.
struct RowStrides {
  int64_t sequence;
  int64_t head;
  int64_t row;
  int32_t packed;

  // Offset of row `row_index` of a sequence, when earlier sequences have `before` rows.
  PBS_HOST_DEVICE constexpr int64_t Offset(int32_t sequence_index, int32_t before,
                                           int32_t head_index,
                                           int32_t row_index) const {
    const int64_t start =
        packed != 0 ? int64_t{before} * row : sequence_index * sequence;
    return start + head_index * head + row_index * row;
  }
  bool operator==(const RowStrides&) const = default;
};

// Rows of 16-bit elements; strides and the address are multiples of eight elements.
struct RowOperand {
  const uint16_t* data;
  RowStrides strides;

  bool operator==(const RowOperand&) const = default;
};

}  // namespace pbs::cuda
