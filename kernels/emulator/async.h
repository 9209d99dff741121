// Asynchronous copies and products, which end after their start.
#pragma once

#include <array>
#include <cstdint>

#include "emulator/machine.h"

namespace pbs::emulator {

// A tensor map: [batch, heads, rows, width] 16-bit elements and the box that one copy
// moves, as the hardware's descriptor says it. The innermost box row is 128 bytes,
// swizzled.
struct TensorMap {
  const uint16_t* data = nullptr;
  int64_t width = 0;
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t batch = 1;
  int64_t row_stride = 0;  // elements
  int64_t head_stride = 0;
  int64_t batch_stride = 0;
  int32_t box_rows = 0;

  bool Holds(int64_t column, int64_t row, int64_t head, int64_t sequence) const {
    return column >= 0 && column < width && row >= 0 && row < rows && head >= 0 &&
           head < heads && sequence >= 0 && sequence < batch;
  }
  const uint16_t* At(int64_t column, int64_t row, int64_t head,
                     int64_t sequence) const {
    return data + sequence * batch_stride + head * head_stride + row * row_stride +
           column;
  }
};

constexpr int kBoxColumns = 64;  // 128 bytes

// Copies the box at (column, row, head, batch) to `target`, 1024-byte aligned shared
// memory; what lies outside the tensor arrives as zeros. `barrier` receives the bytes
// of the whole box when the copy ends. The target is poisoned until then.
void CopyBox(void* target, const TensorMap& map, uint64_t* barrier, int32_t column,
             int32_t row, int32_t head, int32_t batch, const Location& where);

// As CopyBox(), for contiguous bytes.
void CopyBytes(void* target, const void* source, int64_t bytes, uint64_t* barrier,
               const Location& where);

// Copies a box of shared memory to the tensor at a later moment, without the part
// outside the tensor. Until then the shared memory must not change.
void StoreBox(const TensorMap& map, const void* source, int32_t column, int32_t row,
              int32_t head, int32_t batch, const Location& where);
void StoreCommit();
// Returns when the stores of all committed groups of the calling thread have read
// shared memory.
void StoreWaitRead(const Location& where);

// Warpgroup products sums[64, columns] (+)= a[64, 16] b[16, columns]. `sums` holds the
// calling thread's fragment, columns / 2 registers; it is NaN until WgmmaWait() says
// that the product is done. a comes from shared memory, K-major, or from registers.
struct ProductShape {
  int columns = 0;
  bool b_transposed = false;  // b is MN-major
  bool bf16 = false;          // else f16
};
void IssueProduct(const ProductShape& shape, float* sums, bool accumulate,
                  uint64_t a_descriptor, const std::array<uint32_t, 4>* a_registers,
                  uint64_t b_descriptor, const Location& where);
void WgmmaFence(const Location& where);
void WgmmaCommit(const Location& where);
// Returns when at most `groups` committed groups of the calling thread are under way.
void WgmmaWait(int groups, const Location& where);

}  // namespace pbs::emulator
