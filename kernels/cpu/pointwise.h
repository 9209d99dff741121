// Pointwise operations of the CPU backend, with rows distributed over the pool's
// workers.
//
// Threading and memory: as Backend; nothing is allocated.
#pragma once

#include "cpu/isa.h"
#include "cpu/pointwise_kernels.h"
#include "cpu/thread_pool.h"
#include "pbs/backend.h"

namespace pbs::cpu {

// The table of `isa`. Call its functions only when IsSupported(isa).
const PointwiseKernels& PointwiseFor(Isa isa);

// As the methods of Backend with these names.
void Embed(ThreadPool& pool, const PointwiseKernels& kernels, const EmbedOp& op);
void Rotations(ThreadPool& pool, const RotationsOp& op);
void RmsNorm(ThreadPool& pool, const PointwiseKernels& kernels, const RmsNormOp& op);
void Qkv(ThreadPool& pool, const PointwiseKernels& kernels, const QkvOp& op);
void Logits(ThreadPool& pool, const PointwiseKernels& kernels, const LogitsOp& op);
void CopyRows(ThreadPool& pool, const PointwiseKernels& kernels, const CopyRowsOp& op);

}  // namespace pbs::cpu
