// The attention kernels as functions of the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/attention/attention_tile.h"
#include "cuda/backend/attention_variants.h"
#include "cuda/tiles/row_operand.h"

namespace pbs::cuda {

struct AttentionLaunch {
  AttentionParams params;
  RowOperand q, k, v;
  // How far the operands reach, which copies of boxes must know: heads, rows of one
  // head (of all sequences if packed, of the longest if not), sequences.
  int32_t num_heads = 0;
  int32_t num_order_heads = 0;
  int64_t q_rows = 0;
  int64_t kv_rows = 0;
  int32_t num_sequences = 0;
  int32_t head_dim = 0;
  bool bf16 = true;
  int32_t num_multiprocessors = 0;
  AttentionVariant variant = AttentionVariant::kChosen;
};

// Head dim 64, 96, 128, 256.
cudaError_t LaunchAttentionSm80(const AttentionLaunch& launch, cudaStream_t stream);
// Head dim 64, 128; devices of compute capability 9.0.
cudaError_t LaunchAttentionSm90(const AttentionLaunch& launch, cudaStream_t stream);

}  // namespace pbs::cuda
