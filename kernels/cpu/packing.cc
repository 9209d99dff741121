#include "cpu/packing.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace pbs::cpu {
namespace {

// Calls visit(first column, width, panel words) for every panel of [depth, cols].
template <class Visitor>
void ForEachPanel(int32_t panel_width, int32_t cols, int32_t depth, uint32_t* panels,
                  Visitor&& visit) {
  for (int32_t col = 0; col < cols; col += panel_width) {
    const int32_t width = std::min(panel_width, cols - col);
    visit(col, width, panels);
    panels += static_cast<int64_t>(width) * depth;
  }
}

}  // namespace

void RowToF32(const TileKernels& kernels, DType dtype, const void* row, int32_t width,
              float* out) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, row, static_cast<size_t>(width) * sizeof(float));
      return;
    case DType::kF16:
      return kernels.f16_to_f32(static_cast<const uint16_t*>(row), out, width);
    case DType::kBF16:
      return kernels.bf16_to_f32(static_cast<const uint16_t*>(row), out, width);
  }
}

void RowFromF32(const TileKernels& kernels, DType dtype, const float* row,
                int32_t width, void* out) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out, row, static_cast<size_t>(width) * sizeof(float));
      return;
    case DType::kF16:
      return kernels.f32_to_f16(row, static_cast<uint16_t*>(out), width);
    case DType::kBF16:
      return kernels.f32_to_bf16(row, static_cast<uint16_t*>(out), width);
  }
}

void RowToWords(const TileKernels& kernels, const OperandFormat& format,
                const void* row, int32_t width, uint32_t* words) {
  if (format.pairs) {
    std::memcpy(words, row, static_cast<size_t>(width) * sizeof(uint16_t));
  } else {
    RowToF32(kernels, format.dtype, row, width, reinterpret_cast<float*>(words));
  }
}

void PackTransposed(const TileKernels& kernels, const uint32_t* rows, int32_t cols,
                    int32_t depth, uint32_t* panels) {
  ForEachPanel(kernels.panel_width, cols, depth, panels,
               [&](int32_t col, int32_t width, uint32_t* panel) {
                 // Four source rows at a time: one pass over the panel's cache lines
                 // serves four columns.
                 for (int32_t j = 0; j < width; j += 4) {
                   const uint32_t* row0 = rows + static_cast<int64_t>(col + j) * depth;
                   const uint32_t* row1 = row0 + depth;
                   const uint32_t* row2 = row1 + depth;
                   const uint32_t* row3 = row2 + depth;
                   for (int32_t k = 0; k < depth; ++k) {
                     uint32_t* out = panel + static_cast<int64_t>(k) * width + j;
                     out[0] = row0[k];
                     out[1] = row1[k];
                     out[2] = row2[k];
                     out[3] = row3[k];
                   }
                 }
               });
}

void PackRows(const TileKernels& kernels, const uint32_t* rows, int32_t depth,
              int32_t cols, uint32_t* panels) {
  ForEachPanel(kernels.panel_width, cols, depth, panels,
               [&](int32_t col, int32_t width, uint32_t* panel) {
                 for (int32_t k = 0; k < depth; ++k) {
                   std::memcpy(panel + static_cast<int64_t>(k) * width,
                               rows + static_cast<int64_t>(k) * cols + col,
                               static_cast<size_t>(width) * sizeof(uint32_t));
                 }
               });
}

void PackRowsAsPairs(const TileKernels& kernels, const uint32_t* rows, int32_t keys,
                     int32_t cols, uint32_t* panels) {
  const int32_t row_words = cols / 2;
  ForEachPanel(kernels.panel_width, cols, keys / 2, panels,
               [&](int32_t col, int32_t width, uint32_t* panel) {
                 for (int32_t k = 0; k < keys / 2; ++k) {
                   const uint32_t* even =
                       rows + static_cast<int64_t>(2 * k) * row_words + col / 2;
                   const uint32_t* odd = even + row_words;
                   uint32_t* out = panel + static_cast<int64_t>(k) * width;
                   for (int32_t j = 0; j < width / 2; ++j) {
                     out[2 * j] = (even[j] & 0xFFFFu) | (odd[j] << 16);
                     out[2 * j + 1] = (even[j] >> 16) | (odd[j] & 0xFFFF0000u);
                   }
                 }
               });
}

void StoreColumn(const TileKernels& kernels, int32_t cols, int32_t col, int32_t depth,
                 const float* values, float* panels) {
  StoreColumnPart(kernels, {cols, depth}, col, 0, {values, static_cast<size_t>(depth)},
                  panels);
}

void StoreColumnPart(const TileKernels& kernels, const PanelShape& shape, int32_t col,
                     int32_t begin, std::span<const float> values, float* panels) {
  const int32_t first = col / kernels.panel_width * kernels.panel_width;
  const int32_t width = std::min(kernels.panel_width, shape.cols - first);
  float* out = panels + static_cast<int64_t>(first) * shape.depth + (col - first) +
               static_cast<int64_t>(begin) * width;
  for (const float value : values) {
    *out = value;
    out += width;
  }
}

}  // namespace pbs::cpu
