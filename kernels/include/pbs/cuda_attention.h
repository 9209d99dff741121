// Attention on a CUDA device (compute capability 8.0 and later; Hopper has kernels of
// its own).
//
// f16 and bf16; head dim 64, 96, 128 and 256; blocks of 128 tokens. Plan() answers
// Unimplemented, with what there is instead, to anything else. q, k, v and o
// must be 16-byte aligned, their strides multiples of eight elements, and positive
// where there is more than one row, head or sequence (nothing is broadcast). Tensors,
// lists, orders and the workspace (256-byte aligned) lie in device memory.
//
// Run() only enqueues kernels on the stream: no allocation, no copy, no wait; it can be
// captured into a graph. Scores that overflow show in its report. A head that falls
// back to dense keeps its order and reads every block of its own and earlier segments.
// Masked scores may be -inf before they are summed: products of finite inputs that
// overflow to +inf make NaN there. Rows behind the end of a sequence may be read, up to
// the longest one's or the next one's; whatever they hold does not reach a result.
//
// A report is of the last run, or of the last launch of a graph with one. Times:
// permute and select are differences of the device's own clock, in its steps; attend
// has what they leave of the time between two events around the run, behind which
// coverage is measured. Pinned memory is allocated when a plan needs more of it than
// any before; 4 KiB are there.
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
