// As split_heads.h, for one block of rows at a time. It also writes the mean of each
// block of queries, so that selection need not read the queries again.
#pragma once

#include <cstdint>

#include "cuda/model/split_heads.h"
#include "cuda/selection/block_rows.h"

namespace pbs::cuda {

struct PoolHeadsParams {
  SplitHeadsParams split;
  float* pooled_queries;  // [blocks, num_heads, head_dim]
  int32_t row_in_block;   // index of the first row in the first block
};

// Grid [blocks of rows, ceil(heads / kHeads)]; the second index changes fastest. A
// thread block has kHeads heads of a row side by side, so that cosines and sines are
// loaded once. It supports the head dims of attention. Dynamic shared memory:
// SharedBytes().
class PoolHeads {
 public:
  static constexpr int kThreads = 512;
  static constexpr int kHeads = 4;
  static constexpr int kRowsUnderWay = 2;  // rows that a thread loads at once

  static constexpr int64_t Blocks(const PoolHeadsParams& params) {
    const int64_t rows = int64_t{params.row_in_block} + params.split.rows;
    return (rows + kBlockTokens - 1) / kBlockTokens * HeadGroups(params.split);
  }
  static constexpr int64_t SharedBytes(int head_dim) {
    return int64_t{kHeads} * PartialSums(head_dim) * head_dim * 4;
  }

  PBS_DEVICE static void Run(const PoolHeadsParams& params) { PoolHeads(params).Run(); }

 private:
  PBS_HOST_DEVICE static constexpr int HeadGroups(const SplitHeadsParams& params) {
    return (params.num_heads + 2 * params.num_kv_heads + kHeads - 1) / kHeads;
  }

  PBS_DEVICE explicit PoolHeads(const PoolHeadsParams& params)
      : params_(params),
        block_(BlockIndex() / HeadGroups(params.split)),
        first_head_(BlockIndex() % HeadGroups(params.split) * kHeads),
        sums_(reinterpret_cast<float*>(SharedMemory())) {}

  PBS_DEVICE void Run() const {
    const int lanes = LanesOfHead(params_.split.head_dim);
    const int partial_sums = PartialSums(params_.split.head_dim);
    const int head = ThreadIndex() / lanes % kHeads;
    for (int sum = ThreadIndex() / lanes / kHeads; sum < partial_sums;
         sum += kThreads / lanes / kHeads) {
      SumRows(head, sum, partial_sums, lanes);
    }
    if (first_head_ >= params_.split.num_heads) return;  // for the whole thread block
    SyncThreads();
    StoreMeans(partial_sums);
  }

  // Sums every `step`-th row of the block, beginning with row `sum`.
  PBS_DEVICE void SumRows(int head, int sum, int step, int lanes) const {
    const int lane = ThreadIndex() % lanes;
    HeadOfRow::Quads total{};
    PBS_NO_UNROLL
    for (int row = sum; row < kBlockTokens; row += kRowsUnderWay * step) {
      const auto at = [&](int i) {
        return HeadOfRow(params_.split,
                         block_ * kBlockTokens + row + i * step - params_.row_in_block,
                         first_head_ + head, lane);
      };
      HeadOfRow::Quads x[kRowsUnderWay];
      PBS_UNROLL
      for (int i = 0; i < kRowsUnderWay; ++i) x[i] = at(i).Load();
      PBS_UNROLL
      for (int i = 0; i < kRowsUnderWay; ++i) {
        at(i).Finish(x[i], lanes);
        Add(total.low, x[i].low);
        Add(total.high, x[i].high);
      }
    }
    const int half = params_.split.head_dim / 2;
    if (first_head_ >= params_.split.num_heads || lane * kQuad >= half) return;
    float* target = sums_ + (head * step + sum) * 2 * half + lane * kQuad;
    Store(target, total.low);
    Store(target + half, total.high);
  }

  PBS_DEVICE void Add(Quad& total, const Quad& x) const {
    const Quad rounded = Rounded(x, params_.split.kv_dtype);
    PBS_UNROLL
    for (int i = 0; i < kQuad; ++i) total.x[i] += rounded.x[i];
  }

  PBS_DEVICE static void Store(float* target, const Quad& value) {
    StoreShared(reinterpret_cast<Words4*>(target),
                Words4{FloatBits(value.x[0]), FloatBits(value.x[1]),
                       FloatBits(value.x[2]), FloatBits(value.x[3])});
  }

  PBS_DEVICE void StoreMeans(int partial_sums) const {
    const int head_dim = params_.split.head_dim;
    const int left = params_.split.num_heads - first_head_;
    const int columns = (left < kHeads ? left : kHeads) * head_dim;
    float* target =
        params_.pooled_queries +
        (int64_t{block_} * params_.split.num_heads + first_head_) * head_dim;
    for (int column = ThreadIndex(); column < columns; column += kThreads) {
      const int head = column / head_dim;
      const float* sums =
          sums_ + head * partial_sums * head_dim + (column - head * head_dim);
      StoreGlobal(target + column, MeanOfPartialSums(sums, partial_sums, head_dim));
    }
  }

  const PoolHeadsParams& params_;
  const int block_;
  const int first_head_;
  float* const sums_;  // [kHeads, partial sums, head_dim]
};

}  // namespace pbs::cuda
