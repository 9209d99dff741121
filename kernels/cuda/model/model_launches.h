// Backend operations as launches of kernels, for the launchers of plan/pipeline.h (CUDA
// or the emulator).
#pragma once

#include "cuda/model/dot_rows.h"
#include "cuda/model/gate_rows.h"
#include "cuda/model/make_rotations.h"
#include "cuda/model/move_rows.h"
#include "cuda/model/normalize_rows.h"
#include "cuda/model/pool_heads.h"
#include "cuda/model/split_heads.h"
#include "pbs/backend.h"
#include "pbs/check.h"

namespace pbs::cuda {

template <class Launcher>
void EnqueueEmbed(const EmbedOp& op, Launcher& launch) {
  launch.template Run<MoveRows>(
      op.rows, 0,
      MoveRowsParams{.source = op.table,
                     .target = op.residual,
                     .row_index = op.tokens,
                     .quads = static_cast<int32_t>(op.hidden / kQuad),
                     .source_dtype = op.table_dtype,
                     .target_dtype = DType::kF32});
}

template <class Launcher>
void EnqueueRotations(const RotationsOp& op, Launcher& launch) {
  const MakeRotationsParams params = {.frequencies = op.frequencies,
                                      .cosines = op.cosines,
                                      .sines = op.sines,
                                      .factor = op.factor,
                                      .first_position = op.first_position,
                                      .rows = static_cast<int32_t>(op.rows),
                                      .pairs = static_cast<int32_t>(op.pairs)};
  launch.template Run<MakeRotations>(MakeRotations::Blocks(params), 0, params);
}

template <class Launcher>
void EnqueueCopyRows(const CopyRowsOp& op, Launcher& launch) {
  launch.template Run<MoveRows>(
      op.rows, 0,
      MoveRowsParams{.source = op.source,
                     .target = op.target,
                     .row_index = op.row_index,
                     .quads = static_cast<int32_t>(op.cols / kQuad),
                     .source_dtype = op.source_dtype,
                     .target_dtype = op.target_dtype});
}

template <class Launcher>
void EnqueueRmsNorm(const RmsNormOp& op, Launcher& launch) {
  launch.template Run<NormalizeRows>(
      op.rows, NormalizeRows::kSharedBytes,
      NormalizeRowsParams{.x = op.x,
                          .weight = op.weight,
                          .y = op.y,
                          .epsilon = op.epsilon,
                          .quads = static_cast<int32_t>(op.cols / kQuad),
                          .y_dtype = op.y_dtype});
}

template <class Launcher>
void EnqueueQkv(const QkvOp& op, Launcher& launch) {
  const SplitHeadsParams params = {.qkv = op.qkv,
                                   .q = op.q,
                                   .k = op.k,
                                   .v = op.v,
                                   .q_norm = op.q_norm,
                                   .k_norm = op.k_norm,
                                   .cosines = op.cosines,
                                   .sines = op.sines,
                                   .kv_head_stride = op.kv_head_stride,
                                   .epsilon = op.epsilon,
                                   .rows = static_cast<int32_t>(op.rows),
                                   .num_heads = op.num_heads,
                                   .num_kv_heads = op.num_kv_heads,
                                   .head_dim = op.head_dim,
                                   .qkv_dtype = op.qkv_dtype,
                                   .kv_dtype = op.kv_dtype};
  if (op.pooled_queries == nullptr) {
    launch.template Run<SplitHeads>(SplitHeads::Blocks(params), 0, params);
    return;
  }
  PBS_CHECK(op.block_size == kBlockTokens);
  const PoolHeadsParams pooled = {.split = params,
                                  .pooled_queries = op.pooled_queries,
                                  .row_in_block = op.row_in_block};
  launch.template Run<PoolHeads>(PoolHeads::Blocks(pooled),
                                 PoolHeads::SharedBytes(op.head_dim), pooled);
}

template <class Launcher>
void EnqueueLogits(const LogitsOp& op, Launcher& launch) {
  const DotRowsParams params = {.x = op.x,
                                .weight = op.weight,
                                .y = op.y,
                                .rows = static_cast<int32_t>(op.rows),
                                .quads = static_cast<int32_t>(op.hidden / kQuad),
                                .vocab = static_cast<int32_t>(op.vocab),
                                .weight_dtype = op.weight_dtype};
  launch.template Run<DotRows>(DotRows::Blocks(params), 0, params);
}

}  // namespace pbs::cuda
