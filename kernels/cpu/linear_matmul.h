// Products of a row block with one weight panel, through oneDNN.
//
// A weight [out, in] is cut into panels of kPanelCols output columns. A panel is packed
// in the layout that oneDNN chooses, and multiplied into a dense f32 tile. The tile
// stays in the cache until the epilogue has read it. oneDNN's fast implementation needs
// a dense target, and the tile lets us fuse bias, residual and activation.
//
// oneDNN is built on OpenMP here. So every thread that calls Create() or Multiply()
// must have its OpenMP thread count at 1 (UseOneThread()).
//
// Threading: MatmulKernels is immutable; Multiply() may run on many threads at once.
// Memory: Multiply() uses the given scratch. oneDNN's own memory per call is O(1) with
// its "brg" implementation (AVX-512) and a few MiB per thread elsewhere.
#pragma once

#include <array>
#include <cstdint>
#include <dnnl.hpp>
#include <memory>

#include "pbs/dtype.h"
#include "pbs/status.h"

namespace pbs::cpu {

inline constexpr int64_t kPanelCols = 64;
inline constexpr int64_t kRowBlock = 256;

// Products exist for these row counts; other row counts are composed of RowPieces.
inline constexpr std::array<int64_t, 9> kRowBuckets = {1,  2,  4,   8,  16,
                                                       32, 64, 128, 256};
static_assert(kRowBuckets.back() == kRowBlock);

// One product: rows [first, first + count) of x. Rows before `done` were multiplied
// before.
struct RowPiece {
  int64_t first = 0;
  int64_t bucket = 0;  // index into kRowBuckets
  int64_t count = 0;   // kRowBuckets[bucket]
};

// The next piece of a matrix of `rows` rows, of which `done` < rows are multiplied.
// Whole blocks come first. One larger product covers the rest and repeats earlier rows
// where there are enough of them, so that the rest costs at most two calls.
RowPiece NextPiece(int64_t rows, int64_t done);

// Sets the calling thread's OpenMP thread count to 1.
void UseOneThread();

class MatmulKernels {
 public:
  // Creates products of f32 or bf16 operands: x [rows, depth] with rows `x_stride`
  // apart, and panels of `cols` columns. Internal when oneDNN has only its reference
  // code.
  static StatusOr<std::unique_ptr<MatmulKernels>> Create(const dnnl::engine& engine,
                                                         DType operands, int64_t depth,
                                                         int64_t cols,
                                                         int64_t x_stride);

  int64_t cols() const { return cols_; }
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  // "brg:avx512_core"
  const char* implementation() const { return implementation_.c_str(); }

  // rows [cols, depth], operand dtype -> panel [panel_bytes()].
  Status Pack(const void* rows, void* panel) const;
  // A packed panel as an argument of Multiply(). Writes zeros to the panel's padding.
  dnnl::memory PanelMemory(void* panel) const;
  // tile[piece.count, cols] = x[piece.first ...] * panel
  Status Multiply(const void* x, const RowPiece& piece, const dnnl::memory& panel,
                  float* tile, void* scratch) const;

 private:
  MatmulKernels(const dnnl::engine& engine, DType operands, int64_t depth, int64_t cols,
                int64_t x_stride);
  // Throws dnnl::error.
  void CreatePrimitives();

  const dnnl::engine engine_;
  const DType operands_;
  const int64_t depth_;
  const int64_t cols_;
  const int64_t x_stride_;
  int64_t panel_bytes_ = 0;
  int64_t scratch_bytes_ = 0;
  std::string implementation_;
  dnnl::memory::desc panel_desc_;
  struct Product {
    dnnl::memory::desc x_desc, tile_desc, scratch_desc;
    dnnl::matmul primitive;
  };
  std::array<Product, kRowBuckets.size()> products_;
};

}  // namespace pbs::cpu
