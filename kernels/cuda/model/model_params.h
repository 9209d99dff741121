// Parameters of the model path's kernels that host code needs.
#pragma once

#include <cstdint>

#include "pbs/dtype.h"

namespace pbs::cuda {

constexpr int kQuad = 4;  // elements that a thread reads or writes at once

// Columns of every matrix are a multiple of this; the functions that create them refuse
// other numbers.
constexpr int64_t kColumnsMultiple = 8;

// gate_rows.h
struct GateRowsParams {
  const void* gate_up;  // [rows, 2, 4 quads]
  const float* bias;    // [2, 4 quads] or null
  void* y;              // rows y_stride_quads apart
  int32_t quads;
  int64_t y_stride_quads;
  DType dtype;  // of gate_up and y
};

}  // namespace pbs::cuda
