// Copies rows into the operand forms of the tile kernels (tile_kernels.h). The same
// pass gathers permuted keys and values, so that a permutation needs no pass of its
// own.
//
// Threading: stateless. Memory: allocates nothing.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/tile_kernels.h"
#include "pbs/dtype.h"

namespace pbs::cpu {

// Form of a problem's operands: f32 words, or bf16 pairs when the kernels multiply
// pairs and the input is bf16.
struct OperandFormat {
  DType dtype = DType::kF32;  // dtype of the tensors
  bool pairs = false;

  // Words of a row of `width` elements.
  int32_t Words(int32_t width) const { return pairs ? width / 2 : width; }
};

// Converts one row of `width` elements to f32, and back.
void RowToF32(const TileKernels& kernels, DType dtype, const void* row, int32_t width,
              float* out);
void RowFromF32(const TileKernels& kernels, DType dtype, const float* row,
                int32_t width, void* out);

// Converts one row to words of `format`.
void RowToWords(const TileKernels& kernels, const OperandFormat& format,
                const void* row, int32_t width, uint32_t* words);

// Rows [cols, depth] -> panels of their transpose, a `b` operand [depth, cols]. `cols`
// is a multiple of 16.
void PackTransposed(const TileKernels& kernels, const uint32_t* rows, int32_t cols,
                    int32_t depth, uint32_t* panels);

// Rows [depth, cols] of f32 words -> panels of a `b` operand [depth, cols].
void PackRows(const TileKernels& kernels, const uint32_t* rows, int32_t depth,
              int32_t cols, uint32_t* panels);

// Rows [keys, cols / 2] of bf16 pairs along the columns -> panels of pairs along the
// keys, a `b` operand [keys / 2, cols]. `keys` is even.
void PackRowsAsPairs(const TileKernels& kernels, const uint32_t* rows, int32_t keys,
                     int32_t cols, uint32_t* panels);

// Writes `values` [depth] into column `col` of panels [depth, cols].
void StoreColumn(const TileKernels& kernels, int32_t cols, int32_t col, int32_t depth,
                 const float* values, float* panels);

struct PanelShape {
  int32_t cols = 0;
  int32_t depth = 0;
};
// Writes `values` into column `col` of panels of `shape`, from depth `begin` on.
void StoreColumnPart(const TileKernels& kernels, const PanelShape& shape, int32_t col,
                     int32_t begin, std::span<const float> values, float* panels);

}  // namespace pbs::cpu
