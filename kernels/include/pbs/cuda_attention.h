// Attention on a CUDA device (compute capability 8.0 and later, with separate kernels
// for Hopper).
//
// It supports f16 and bf16, head dims 64, 96, 128 and 256, and blocks of 128 tokens.
// For anything else Plan() returns Unimplemented and names what is supported. q, k, v
// and o must be 16-byte aligned. Their strides must be multiples of eight elements, and
// positive where there is more than one row, head or sequence (nothing is broadcast).
// Tensors, lists, orders and the workspace (256-byte aligned) are in device memory.
//
// Run() only enqueues kernels on the stream: it does not allocate, copy or wait, and it
// can be captured into a graph. The report tells of scores that overflow. A head that
// falls back to dense keeps its order and reads every block of its own and earlier
// segments. Masked scores may be set to -inf before the products are summed, so
// products of finite inputs that overflow to +inf give NaN there. Kernels may read rows
// after the end of a sequence, up to the length of the longest sequence or into the
// next one; their values do not reach a result.
//
// A report describes the last run, or the last launch of a graph that contains one. Its
// permute and select times are differences of the device's clock, in that clock's
// steps. Its attend time is the rest of the time between two events around the run;
// coverage is measured after the second event. Pinned memory grows when a plan needs
// more of it than any plan before; it begins with 4 KiB.
//
// Built with PBS_CUDA=ON.
#pragma once

#include <cstdint>
#include <memory>

#include "pbs/attention.h"
#include "pbs/status.h"

namespace pbs {

struct CudaAttentionOptions {
  int32_t device = 0;
  void* stream = nullptr;  // cudaStream_t; null: the default stream
};

// FailedPrecondition when there is no driver, no such device, or it is too old.
StatusOr<std::unique_ptr<AttentionBackend>> CreateCudaAttention(
    const CudaAttentionOptions& options);

}  // namespace pbs
