// Makes the lists of flashprefill (arXiv 2603.06199). The score of a key block is the
// sum over the rows of the query block of exp(logit of the row and the block's mean
// key), for rows that see the whole block. Kept are the blocks of at least a share of
// the largest score, and those of write_list.h.
//
// The products are those of tensor cores, with 16-bit operands. A mean has more bits
// than an operand holds, so it is the sum of two: rounded, and what rounding left. Both
// are multiplied with the same rows, and the sums are f32. One part alone would change
// scores by up to 2^-9 of a logit, and so the blocks that are kept.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/selection/write_list.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// Writes the means of key blocks as two rows of elements. Grid [num_order_heads,
// total_key_blocks], 128 threads.
//
// The pooled means are divided by the size of a whole block. This is right for all that
// is scored: a short block is the last one, and no row sees it.
template <class Element>
struct SplitMeans {
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    const GridPlace place = PlaceInGrid(params.total_key_blocks);
    const float* means =
        params.pooled_keys +
        int64_t{place.head} * params.head_dim * params.total_key_blocks + place.item;
    auto* rounded = reinterpret_cast<uint32_t*>(
        MeanRow(params, place.head, /*part=*/0, place.item));
    auto* rest = reinterpret_cast<uint32_t*>(
        MeanRow(params, place.head, /*part=*/1, place.item));
    for (int pair = ThreadIndex(); pair < params.head_dim / 2; pair += kThreads) {
      const float* at = means + int64_t{2 * pair} * params.total_key_blocks;
      const float a = LoadGlobal(at);
      const float b = LoadGlobal(at + params.total_key_blocks);
      StoreGlobal(rounded + pair, Element::Pack(a, b));
      StoreGlobal(rest + pair,
                  Element::Pack(a - Element::Round(a), b - Element::Round(b)));
    }
  }

  // Row of a part of the mean of a block, counted over all sequences.
  PBS_DEVICE static uint16_t* MeanRow(const SelectionParams& params, int order_head,
                                      int part, int block) {
    return params.mean_rows +
           ((int64_t{order_head} * kMeanParts + part) * params.total_key_blocks +
            block) *
               params.head_dim;
  }
};

// The energies of the query block, one float per key block, follow it in shared memory.
template <int kHeadDim>
struct alignas(128) RowsShared {
  SharedRows<kBlockTokens, kHeadDim> q;
  SharedRows<kScoredKeys, kHeadDim> means[KeyBuffers(kHeadDim)];
  // Of the logits of each warp's rows, in units of log2: the largest, and the sum of
  // 2^(logit - largest).
  float tops[4][kScoredKeys];
  float sums[4][kScoredKeys];

  PBS_DEVICE float* energies() { return reinterpret_cast<float*>(this + 1); }
};

// Grid [num_heads, total_query_blocks], 128 threads of 32 rows per warp. Dynamic shared
// memory: RowsSharedBytes().
template <class Element, int kHeadDim>
class SelectRows {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kResidentBlocks = KeyBuffers(kHeadDim) > 1 ? 3 : 2;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    SelectRows(params, PlaceInGrid(params.total_query_blocks)).Run();
  }

 private:
  using Means = SharedRows<kScoredKeys, kHeadDim>;
  static constexpr int kRowTiles = 2;  // a warp has 32 rows
  static constexpr int kBuffers = KeyBuffers(kHeadDim);
  using Scores = float[kRowTiles][kScoredKeys / 2];
  static_assert(sizeof(RowsShared<kHeadDim>) == RowsSharedBytes(kHeadDim, 0));

  PBS_DEVICE SelectRows(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        s_(*reinterpret_cast<RowsShared<kHeadDim>*>(SharedMemory())),
        head_(place.head),
        sequence_index_(FindSequence<&SequenceRecord::query_block_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        query_block_(place.item - sequence_.query_block_begin),
        block_(sequence_.first_query_block + query_block_) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    const int candidates = NumCandidates(params_, block_);
    const bool scores =
        candidates > 0 && !IsDenseTail(params_, sequence_, query_block_);
    if (scores) Score(candidates);
    if (ThreadIndex() >= 32) return;
    const float least = scores ? LeastEnergy(candidates) : kInfinity;
    WriteList(params_, sequence_, {head_, sequence_index_, query_block_},
              [&](int block, bool is_earlier) {
                return scores && is_earlier &&
                       LoadShared(s_.energies() + block) >= least;
              });
  }

  // Rows of the tile that exist: [RowBegin(), RowEnd()).
  PBS_DEVICE int RowBegin() const {
    const int begin = sequence_.query_offset - block_ * kBlockTokens;
    return begin > 0 ? begin : 0;
  }
  PBS_DEVICE int RowEnd() const {
    const int end = sequence_.k_len - block_ * kBlockTokens;
    return end < kBlockTokens ? end : kBlockTokens;
  }

  // Energies of the blocks [0, candidates).
  PBS_DEVICE void Score(int candidates) {
    const int first = block_ * kBlockTokens - sequence_.query_offset;
    s_.q.template Load<kThreads>(
        params_.q.data +
            params_.q.strides.Offset(sequence_index_, sequence_.q_begin, head_, first),
        params_.q.strides.row, RowBegin(), RowEnd());
    const int steps = (candidates + kScoredKeys - 1) / kScoredKeys * kMeanParts;
    LoadMeans(0, candidates);
    const float scale_log2 = kLog2E / Sqrt(static_cast<float>(kHeadDim));
    PBS_NO_UNROLL
    for (int step = 0; step < steps;) {
      Scores scores = {};
      PBS_NO_UNROLL
      for (int part = 0; part < kMeanParts; ++part, ++step) {
        CopyAsyncWait<0>();
        SyncThreads();  // means are there, and nobody reads the last ones
        if (kBuffers > 1 && step + 1 < steps) LoadMeans(step + 1, candidates);
        MultiplyKeys<Element, kRowTiles>(s_.q, ThreadIndex() / 32 * 32, Buffer(step),
                                         ThreadIndex() % 32, scores);
        if (kBuffers == 1) {
          SyncThreads();  // the next means may come
          if (step + 1 < steps) LoadMeans(step + 1, candidates);
        }
      }
      const int first_block = (step / kMeanParts - 1) * kScoredKeys;
      const bool has_diagonal = first_block + kScoredKeys > block_;
      if (has_diagonal || RowBegin() > 0 || RowEnd() < kBlockTokens) {
        Mask(first_block, scores);
      }
      SumRows(scale_log2, scores);
      SyncThreads();
      if (ThreadIndex() < kScoredKeys && first_block + ThreadIndex() < candidates) {
        StoreShared(s_.energies() + first_block + ThreadIndex(),
                    Energy(first_block + ThreadIndex()));
      }
    }
    SyncThreads();
  }

  PBS_DEVICE Means& Buffer(int step) const { return s_.means[step % kBuffers]; }

  // Starts to load the parts of means of a step.
  PBS_DEVICE void LoadMeans(int step, int candidates) const {
    const int first = step / kMeanParts * kScoredKeys;
    Buffer(step).template Load<kThreads>(
        SplitMeans<Element>::MeanRow(params_, head_ / Members(params_),
                                     step % kMeanParts,
                                     sequence_.key_block_begin + first),
        kHeadDim, 0, candidates - first);
    CopyAsyncCommit();
  }

  // Scores of rows that do not exist, and of rows that do not see the last key of the
  // diagonal block, become -inf.
  PBS_DEVICE void Mask(int first_block, Scores& scores) const {
    const int lane = ThreadIndex() % 32;
    const int begin = RowBegin();
    const int end = RowEnd();
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < kScoredKeys / 2; ++i) {
        const int row = ThreadIndex() / 32 * 32 + t * 16 + lane / 4 + i / 2 % 2 * 8;
        const int block = first_block + i / 4 * 8 + lane % 4 * 2 + i % 2;
        const bool sees = block < block_ || row == kBlockTokens - 1;
        if (row < begin || row >= end || !sees) scores[t][i] = -kInfinity;
      }
    }
  }

  // Energies of the warp's rows, for each block of the step.
  PBS_DEVICE void SumRows(float scale_log2, const Scores& scores) const {
    const int lane = ThreadIndex() % 32;
    PBS_UNROLL
    for (int column = 0; column < kScoredKeys / 4; ++column) {
      const int at = column / 2 * 4 + column % 2;  // index of row pair 0
      float top = Max(Max(scores[0][at], scores[0][at + 2]),
                      Max(scores[1][at], scores[1][at + 2]));
      PBS_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) top = Max(top, ShuffleXor(top, mask));
      top *= scale_log2;
      const float shift = top == -kInfinity ? 0.0f : top;  // no row sees it
      float sum = 0;
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        PBS_UNROLL
        for (int r = 0; r < 2; ++r) {
          sum += Exp2(scores[t][at + 2 * r] * scale_log2 - shift);
        }
      }
      PBS_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) sum += ShuffleXor(sum, mask);
      if (lane < 4) {
        const int block = column / 2 * 8 + lane * 2 + column % 2;
        StoreShared(&s_.tops[ThreadIndex() / 32][block], top);
        StoreShared(&s_.sums[ThreadIndex() / 32][block], sum);
      }
    }
  }

  // log2 of the sum over all rows, of a block of the step. -inf: no row sees the block.
  PBS_DEVICE float Energy(int block) const {
    const int at = block % kScoredKeys;
    // As published, rows of zeros fill a short block: their logits are 0. Only the last
    // of them sees the diagonal block, but all may count there, too: no score of
    // another block is smaller then.
    const int zeros = params_.zero_rows != 0 ? kBlockTokens - RowEnd() : 0;
    float top = zeros > 0 ? 0.0f : -kInfinity;
    PBS_UNROLL
    for (int warp = 0; warp < 4; ++warp) {
      top = Max(top, LoadShared(&s_.tops[warp][at]));
    }
    const float shift = top == -kInfinity ? 0.0f : top;
    float sum = zeros > 0 ? static_cast<float>(zeros) * Exp2(-shift) : 0.0f;
    PBS_UNROLL
    for (int warp = 0; warp < 4; ++warp) {
      sum +=
          LoadShared(&s_.sums[warp][at]) * Exp2(LoadShared(&s_.tops[warp][at]) - shift);
    }
    return top + Log2(sum);
  }

  // The least energy that is kept. Sets the flag and keeps nothing where one is not
  // finite. One warp calls.
  PBS_DEVICE float LeastEnergy(int candidates) const {
    const int lane = ThreadIndex() % 32;
    float top = -kInfinity;
    bool finite = true;
    for (int block = lane; block < candidates; block += 32) {
      const float energy = LoadShared(s_.energies() + block);
      // No row sees a diagonal block that is short.
      finite = finite && (energy < kInfinity) &&
               (energy > -kInfinity || (block == block_ && RowEnd() < kBlockTokens));
      top = Max(top, energy);
    }
    for (int mask = 1; mask < 32; mask *= 2) top = Max(top, ShuffleXor(top, mask));
    if (Ballot(!finite) != 0) {
      if (lane == 0) StoreGlobal(params_.non_finite, 1);
      return kInfinity;
    }
    return top + params_.share_log2;
  }

  const SelectionParams& params_;
  RowsShared<kHeadDim>& s_;
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int query_block_;  // of the sequence
  const int block_;        // absolute index
};

}  // namespace pbs::cuda
