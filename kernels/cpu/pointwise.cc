#include "cpu/pointwise.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pbs::cpu {
namespace {

static_assert(static_cast<int>(Element::kF32) == static_cast<int>(DType::kF32) &&
              static_cast<int>(Element::kF16) == static_cast<int>(DType::kF16) &&
              static_cast<int>(Element::kBf16) == static_cast<int>(DType::kBF16));

constexpr int64_t kRowsPerJob = 16;
constexpr int64_t kLogitsPerJob = 64;  // rows of the output head

Element ElementOf(DType dtype) { return static_cast<Element>(dtype); }

const char* At(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * DTypeBytes(dtype);
}

char* At(void* data, int64_t index, DType dtype) {
  return static_cast<char*>(data) + index * DTypeBytes(dtype);
}

// Calls body(row) for every row, kRowsPerJob of them to a job.
template <class Body>
void ForRows(ThreadPool& pool, int64_t rows, const Body& body) {
  pool.ParallelFor((rows + kRowsPerJob - 1) / kRowsPerJob, [&](int64_t job, int) {
    const int64_t end = std::min(rows, (job + 1) * kRowsPerJob);
    for (int64_t row = job * kRowsPerJob; row < end; ++row) body(row);
  });
}

void QkvRow(const PointwiseKernels& kernels, const QkvOp& op, int64_t row) {
  const int64_t dim = op.head_dim;
  const int64_t width = (op.num_heads + 2 * int64_t{op.num_kv_heads}) * dim;
  const Element from = ElementOf(op.qkv_dtype);
  const Element to = ElementOf(op.kv_dtype);
  const float* cosines = op.cosines + row * (dim / 2);
  const float* sines = op.sines + row * (dim / 2);
  const char* head = At(op.qkv, row * width, op.qkv_dtype);
  const int64_t head_bytes = dim * DTypeBytes(op.qkv_dtype);
  for (int64_t h = 0; h < op.num_heads; ++h, head += head_bytes) {
    kernels.rotate_head(head, from, op.q_norm, op.epsilon, cosines, sines, dim,
                        At(op.q, (row * op.num_heads + h) * dim, op.kv_dtype), to);
  }
  for (int64_t h = 0; h < op.num_kv_heads; ++h, head += head_bytes) {
    kernels.rotate_head(head, from, op.k_norm, op.epsilon, cosines, sines, dim,
                        At(op.k, h * op.kv_head_stride + row * dim, op.kv_dtype), to);
  }
  for (int64_t h = 0; h < op.num_kv_heads; ++h, head += head_bytes) {
    char* target = At(op.v, h * op.kv_head_stride + row * dim, op.kv_dtype);
    if (op.qkv_dtype == op.kv_dtype) {
      std::memcpy(target, head, static_cast<size_t>(head_bytes));
    } else if (op.qkv_dtype == DType::kF32) {
      kernels.narrow(reinterpret_cast<const float*>(head), target, to, dim);
    } else {
      ConvertElements(head, op.qkv_dtype, target, op.kv_dtype, dim);
    }
  }
}

}  // namespace

const PointwiseKernels& PointwiseFor(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return kScalarPointwise;
    case Isa::kAvx2:
      return kAvx2Pointwise;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return kAvx512Pointwise;
  }
  return kScalarPointwise;
}

void Embed(ThreadPool& pool, const PointwiseKernels& kernels, const EmbedOp& op) {
  ForRows(pool, op.rows, [&](int64_t row) {
    kernels.widen(At(op.table, op.tokens[row] * op.hidden, op.table_dtype),
                  ElementOf(op.table_dtype), op.residual + row * op.hidden, op.hidden);
  });
}

void Rotations(ThreadPool& pool, const RotationsOp& op) {
  ForRows(pool, op.rows, [&](int64_t row) {
    const auto position = static_cast<double>(op.first_position + row);
    for (int64_t i = 0; i < op.pairs; ++i) {
      const double angle = position * op.frequencies[i];
      op.cosines[row * op.pairs + i] = static_cast<float>(std::cos(angle) * op.factor);
      op.sines[row * op.pairs + i] = static_cast<float>(std::sin(angle) * op.factor);
    }
  });
}

void RmsNorm(ThreadPool& pool, const PointwiseKernels& kernels, const RmsNormOp& op) {
  ForRows(pool, op.rows, [&](int64_t row) {
    kernels.rms_norm(op.x + row * op.cols, op.weight, op.epsilon, op.cols,
                     At(op.y, row * op.cols, op.y_dtype), ElementOf(op.y_dtype));
  });
}

void Qkv(ThreadPool& pool, const PointwiseKernels& kernels, const QkvOp& op) {
  ForRows(pool, op.rows, [&](int64_t row) { QkvRow(kernels, op, row); });
}

void Logits(ThreadPool& pool, const PointwiseKernels& kernels, const LogitsOp& op) {
  const int64_t jobs = (op.vocab + kLogitsPerJob - 1) / kLogitsPerJob;
  pool.ParallelFor(jobs, [&](int64_t job, int) {
    const int64_t first = job * kLogitsPerJob;
    kernels.row_dots(op.x, op.rows, At(op.weight, first * op.hidden, op.weight_dtype),
                     ElementOf(op.weight_dtype),
                     std::min(kLogitsPerJob, op.vocab - first), op.hidden, op.y + first,
                     op.vocab);
  });
}

void CopyRows(ThreadPool& pool, const PointwiseKernels& kernels, const CopyRowsOp& op) {
  ForRows(pool, op.rows, [&](int64_t row) {
    const int64_t from = op.row_index == nullptr ? row : op.row_index[row];
    const char* source = At(op.source, from * op.cols, op.source_dtype);
    char* target = At(op.target, row * op.cols, op.target_dtype);
    if (op.source_dtype == op.target_dtype) {
      std::memcpy(target, source,
                  static_cast<size_t>(op.cols * DTypeBytes(op.source_dtype)));
    } else if (op.target_dtype == DType::kF32) {
      kernels.widen(source, ElementOf(op.source_dtype),
                    reinterpret_cast<float*>(target), op.cols);
    } else if (op.source_dtype == DType::kF32) {
      kernels.narrow(reinterpret_cast<const float*>(source), target,
                     ElementOf(op.target_dtype), op.cols);
    } else {
      ConvertElements(source, op.source_dtype, target, op.target_dtype, op.cols);
    }
  });
}

}  // namespace pbs::cpu
