// The attention of the last queries of a sequence, summed by key and by distance
// (minference; docs/KERNELS.md, "Columns and diagonals").
//
// SumKeyLines gives the largest logit and the sum of each query and key block,
// WeighKeyLines merges them over the key blocks, and ShareKeyLines computes the scores
// again and sums their probabilities: by key, and by distance within its key block. A
// sum is over rows in rising order, so it has the same bits in every run.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/tiles/online_softmax.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

template <int kHeadDim>
struct alignas(128) KeyLinesShared {
  SharedRows<kLineQueries, kHeadDim> q;
  SharedRows<kScoredKeys, kHeadDim> k;
  // Of ShareKeyLines alone, the probabilities.
  float shares[kLineQueries * kLineStride];
};

// Scores of the last queries with the keys of one block. 128 threads; a warp has 16
// queries.
template <class Element, int kHeadDim>
class KeyLineScores {
 public:
  static constexpr int kThreads = 128;
  using Scores = float[1][kScoredKeys / 2];
  static_assert(sizeof(KeyLinesShared<kHeadDim>) == KeyLinesSharedBytes(kHeadDim));

  PBS_DEVICE KeyLineScores(const SelectionParams& params, const GridPlace& place)
      : s(*reinterpret_cast<KeyLinesShared<kHeadDim>*>(SharedMemory())),
        head(place.head),
        sequence_index(FindSequence<&SequenceRecord::key_block_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence(LoadGlobal(params.sequences + sequence_index)),
        block(place.item),
        queries(sequence.q_len < kLineQueries ? sequence.q_len : kLineQueries),
        params_(params) {}

  // Calls visit(first key of the step, scores) for both halves of the block. Scores of
  // keys that a query does not see are -inf.
  template <class Visit>
  PBS_DEVICE void ForEachStep(Visit&& visit) const {
    const RowOperand& q = params_.q;
    s.q.template Load<kThreads>(
        q.data + q.strides.Offset(sequence_index, sequence.q_begin, head,
                                  sequence.q_len - queries),
        q.strides.row, 0, queries);
    PBS_NO_UNROLL
    for (int first = 0; first < kBlockTokens; first += kScoredKeys) {
      if (first > 0) SyncThreads();  // nobody reads the last keys
      s.k.template Load<kThreads>(params_.permuted_k + (Slots() + first) * kHeadDim,
                                  kHeadDim, 0, kScoredKeys);
      CopyAsyncCommit();
      CopyAsyncWait<0>();
      SyncThreads();
      Scores scores = {};
      MultiplyKeys<Element, 1>(s.q, ThreadIndex() / 32 * 16, s.k, ThreadIndex() % 32,
                               scores);
      Mask(first, scores[0]);
      visit(first, scores[0]);
    }
  }

  // Query of register 2 r + c of a fragment; its position is that of the first + it.
  PBS_DEVICE static int Row(int r) {
    return ThreadIndex() / 32 * 16 + ThreadIndex() % 32 / 4 + 8 * r;
  }
  PBS_DEVICE int FirstPosition() const { return sequence.k_len - queries; }

  KeyLinesShared<kHeadDim>& s;
  const int head;
  const int sequence_index;
  const SequenceRecord sequence;
  const int block;    // of all sequences
  const int queries;  // at most kLineQueries

 private:
  // First slot of the block in the copies.
  PBS_DEVICE int64_t Slots() const {
    return (int64_t{head / Members(params_)} * params_.copied_blocks + block) *
           kBlockTokens;
  }

  // Tells of scores that are not finite, too.
  PBS_DEVICE void Mask(int first, float (&scores)[kScoredKeys / 2]) const {
    bool finite = true;
    PBS_UNROLL
    for (int i = 0; i < kScoredKeys / 4; ++i) {  // columns
      const int key = first + i / 2 * 8 + ThreadIndex() % 4 * 2 + i % 2;
      const int position = LoadGlobal(params_.positions + Slots() + key);
      PBS_UNROLL
      for (int r = 0; r < 2; ++r) {
        float& score = scores[i / 2 * 4 + 2 * r + i % 2];
        if (position > FirstPosition() + Row(r)) {
          score = -kInfinity;
        } else {
          finite = finite && score > -kInfinity && score < kInfinity;
        }
      }
    }
    if (!finite) StoreGlobal(params_.non_finite, 1);
  }

  const SelectionParams& params_;
};

// Grid [num_heads, total_key_blocks], 128 threads; dynamic shared memory:
// KeyLineScoresBytes().
template <class Element, int kHeadDim>
struct SumKeyLines {
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    const KeyLineScores<Element, kHeadDim> lines(params,
                                                 PlaceInGrid(params.total_key_blocks));
    if (lines.sequence.sparse == 0) return;
    const float scale_log2 = params.key_lines.scale_log2;
    OnlineSoftmax softmax;
    softmax.Reset();
    lines.ForEachStep([&](int, float(&scores)[kScoredKeys / 2]) {
      softmax.template Add<true>(scale_log2, scores);
    });
    const int64_t at =
        (int64_t{lines.head} * params.total_key_blocks + lines.block) * kLineQueries;
    PBS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax.RowSum(r);
      if (ThreadIndex() % 4 != 0) continue;
      StoreGlobal(params.key_lines.block_max + at + lines.Row(r),
                  softmax.max[r] * scale_log2);
      StoreGlobal(params.key_lines.block_sum + at + lines.Row(r), sum);
    }
  }
};

// Grid [num_heads, num_sequences], 1024 threads: 16 for a query, each with every 16th
// key block.
class WeighKeyLines {
 public:
  static constexpr int kThreads = 1024;
  static constexpr int kResidentBlocks = 1;
  static constexpr int kParts = kThreads / kLineQueries;
  static constexpr int kSharedBytes = kThreads * 8;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const GridPlace place = PlaceInGrid(params.num_sequences);
    const SequenceRecord s = LoadGlobal(params.sequences + place.item);
    if (s.sparse == 0) return;
    const KeyLineParams& lines = params.key_lines;
    const int row = ThreadIndex() % kLineQueries;
    const int64_t first = int64_t{place.head} * params.total_key_blocks +
                          s.key_block_begin + ThreadIndex() / kLineQueries;
    Sum sum;
    for (int block = 0; block + ThreadIndex() / kLineQueries < s.num_key_blocks;
         block += kParts) {
      const int64_t at = (first + block) * kLineQueries + row;
      sum.Merge({LoadGlobal(lines.block_max + at), LoadGlobal(lines.block_sum + at)});
    }
    auto* parts = reinterpret_cast<float*>(SharedMemory());
    StoreShared(parts + ThreadIndex(), sum.max);
    StoreShared(parts + kThreads + ThreadIndex(), sum.total);
    SyncThreads();
    if (ThreadIndex() >= kLineQueries) return;
    for (int part = 1; part < kParts; ++part) {
      const int at = part * kLineQueries + row;
      sum.Merge({LoadShared(parts + at), LoadShared(parts + kThreads + at)});
    }
    const int queries = s.q_len < kLineQueries ? s.q_len : kLineQueries;
    const int64_t at = int64_t{BlockIndex()} * kLineQueries + row;
    StoreGlobal(lines.shift + at, row < queries ? sum.max : 0.0f);
    StoreGlobal(
        lines.weight + at,
        row < queries ? 1.0f / (sum.total * static_cast<float>(queries)) : 0.0f);
  }

 private:
  struct Sum {
    float max = -kInfinity;
    float total = 0;

    PBS_DEVICE void Merge(const Sum& other) {
      const float top = Max(max, other.max);
      if (top == -kInfinity) return;  // no key is seen
      total = total * Exp2(max - top) + other.total * Exp2(other.max - top);
      max = top;
    }
  };
};

// Grid [num_heads, total_key_blocks], 128 threads; dynamic shared memory:
// KeyLinesSharedBytes().
template <class Element, int kHeadDim>
class ShareKeyLines {
 public:
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const Scores lines(params, PlaceInGrid(params.total_key_blocks));
    if (lines.sequence.sparse == 0) return;
    const int64_t at =
        (int64_t{lines.head} * params.num_sequences + lines.sequence_index) *
        kLineQueries;
    float shift[2];
    float weight[2];
    PBS_UNROLL
    for (int r = 0; r < 2; ++r) {
      shift[r] = LoadGlobal(params.key_lines.shift + at + lines.Row(r));
      weight[r] = LoadGlobal(params.key_lines.weight + at + lines.Row(r));
    }
    lines.ForEachStep([&](int first, float(&scores)[kScoredKeys / 2]) {
      PBS_UNROLL
      for (int i = 0; i < kScoredKeys / 2; ++i) {
        const int r = i / 2 % 2;
        const int key = first + i / 4 * 8 + ThreadIndex() % 4 * 2 + i % 2;
        StoreShared(
            lines.s.shares + lines.Row(r) * kLineStride + key,
            Exp2(scores[i] * params.key_lines.scale_log2 - shift[r]) * weight[r]);
      }
    });
    SyncThreads();
    SumColumn(params, lines);
    SumDiagonals(params, lines);
  }

 private:
  using Scores = KeyLineScores<Element, kHeadDim>;

  // A thread has one key.
  PBS_DEVICE static void SumColumn(const SelectionParams& params, const Scores& lines) {
    float sum = 0;
    for (int row = 0; row < kLineQueries; ++row) {
      sum += LoadShared(lines.s.shares + row * kLineStride + ThreadIndex());
    }
    StoreGlobal(params.key_lines.columns +
                    (int64_t{lines.head} * params.total_key_blocks + lines.block) *
                        kBlockTokens +
                    ThreadIndex(),
                sum);
  }

  // Sum i is of the i-th distance, from that of the first query and the last key on.
  // Those below 0 are not read: only sorted keys lie behind a query that sees them, and
  // they would count as distance 0, which is chosen in any case.
  PBS_DEVICE static void SumDiagonals(const SelectionParams& params,
                                      const Scores& lines) {
    float* target =
        params.key_lines.diagonals +
        (int64_t{lines.head} * params.total_key_blocks + lines.block) * kDiagonals;
    for (int i = ThreadIndex(); i < kDiagonals; i += kThreads) {
      float sum = 0;
      for (int row = 0; row < kLineQueries; ++row) {
        const int key = row + kBlockTokens - 1 - i;
        if (key < 0 || key >= kBlockTokens) continue;
        sum += LoadShared(lines.s.shares + row * kLineStride + key);
      }
      StoreGlobal(target + i, sum);
    }
  }
};

}  // namespace pbs::cuda
