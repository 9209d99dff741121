// Makes the lists of xattention (arXiv 2503.16428). Row i of the strided queries is the
// tokens i * stride ... in falling order, column j of the strided keys the tokens
// j * stride ... in rising order. Softmax over the columns j <= i of their products,
// then sums over the rows and columns of a block, give the mass of the block.
//
// A product has stride * head_dim terms, and tensor cores take them one token at a
// time: in a step, the tile of queries has one token of each row, and the tile of keys
// one of each column. So both tiles are rows of head_dim elements, as elsewhere.
//
// Probabilities need the largest logit of a row and the sum of the whole row. These
// come from a first pass over the columns, and a second one computes the same scores
// again: stored scores would take 4 bytes per pair of a strided row and a key block, 2
// GB of 128K tokens and 32 heads.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/mass_cut.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/slot_keys.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/selection/write_list.h"
#include "cuda/tiles/online_softmax.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// The masses of the group's query blocks, a float per key block, follow it in shared
// memory.
template <int kHeadDim>
struct alignas(128) AntidiagonalShared {
  SharedRows<kStridedRows, kHeadDim> q;
  SharedRows<kScoredKeys, kHeadDim> k;

  // Sums of two neighbouring columns, [kStridedRows, kScoredKeys / 2], in the place of
  // the queries.
  PBS_DEVICE float* pairs() { return reinterpret_cast<float*>(q.elements); }
  PBS_DEVICE float* masses() { return reinterpret_cast<float*>(this + 1); }
};

// Key blocks of the rows that the published code ranks in another way.
PBS_DEVICE int FirstChunkBlocks(int k_len) {
  int power = 1;
  while (power < k_len) power *= 2;
  int tokens = power < 2048 ? 2048 : power;
  if (tokens > (1 << 28) / power) tokens = (1 << 28) / power;
  return (tokens < 2048 ? 2048 : tokens) / kBlockTokens;
}

// Grid [num_heads, total_groups], 128 threads of 32 strided rows per warp. Dynamic
// shared memory: AntidiagonalSharedBytes().
template <class Element, int kHeadDim>
class SelectAntidiagonals {
 public:
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    StampTime(params.ordered);
    SelectAntidiagonals(params, PlaceInGrid(params.total_groups)).Run();
  }

 private:
  static constexpr int kRowTiles = 2;  // a warp has 32 rows
  static constexpr int kPairs = kScoredKeys / 2;
  using Scores = float[kRowTiles][kScoredKeys / 2];
  static_assert(sizeof(AntidiagonalShared<kHeadDim>) ==
                AntidiagonalSharedBytes(kHeadDim, 0, 0));
  static_assert(kStridedRows * kPairs * 4 <=
                sizeof(SharedRows<kStridedRows, kHeadDim>));

  PBS_DEVICE SelectAntidiagonals(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        s_(*reinterpret_cast<AntidiagonalShared<kHeadDim>*>(SharedMemory())),
        head_(place.head),
        sequence_index_(FindSequence<&SequenceRecord::group_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_((place.item - sequence_.group_begin) * params.group_blocks),
        per_block_(kBlockTokens / params.stride),
        first_row_((sequence_.first_query_block + first_) * per_block_) {}

  PBS_DEVICE void Run() {
    if (sequence_.sparse == 0) return;
    const int left = sequence_.num_query_blocks - first_;
    const int blocks = left < params_.group_blocks ? left : params_.group_blocks;
    const int columns = NumCandidates(params_, Block(blocks - 1)) * per_block_;
    if (columns > 0) Measure(blocks, columns);
    SyncThreads();
    for (int i = ThreadIndex() / 32; i < blocks; i += kThreads / 32) Write(i);
  }

  PBS_DEVICE int Block(int i) const { return sequence_.first_query_block + first_ + i; }

  // Row of register pair `r` of fragment `t`.
  PBS_DEVICE static int Row(int t, int r) {
    return ThreadIndex() / 32 * 32 + t * 16 + ThreadIndex() % 32 / 4 + r * 8;
  }

  // Columns that each of the thread's rows sees: those up to its own, and with sorted
  // keys only candidates, because the own segment has no diagonal. None where no token
  // of the row is a query.
  PBS_DEVICE void CountVisible(int rows) {
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = first_row_ + Row(t, r);
        const bool exists = Row(t, r) < rows &&
                            (row + 1) * params_.stride > sequence_.query_offset &&
                            row * params_.stride < sequence_.k_len;
        const int candidates = NumCandidates(params_, row / per_block_) * per_block_;
        const int seen = row + 1 < candidates ? row + 1 : candidates;
        visible_[t][r] = exists ? seen : 0;
      }
    }
  }

  // Starts to load one token of every row and of the columns from `column` on.
  PBS_DEVICE void Load(int column, int token) const {
    const int stride = params_.stride;
    // Of row 0; it may be before the first query.
    const int query = (first_row_ + 1) * stride - 1 - token - sequence_.query_offset;
    s_.q.template Load<kThreads>(
        params_.q.data +
            params_.q.strides.Offset(sequence_index_, sequence_.q_begin, head_, query),
        params_.q.strides.row * stride, query < 0 ? (stride - 1 - query) / stride : 0,
        (sequence_.q_len - query + stride - 1) / stride);
    const int key = column * stride + token;
    const SlotKeys keys =
        SlotKeysOf(params_, sequence_, sequence_index_, head_ / Members(params_));
    s_.k.template Load<kThreads>(keys.first + key * keys.stride, keys.stride * stride,
                                 0, (sequence_.k_len - key + stride - 1) / stride);
    CopyAsyncCommit();
  }

  // Scores of all rows with kScoredKeys columns; -inf where a row does not see one.
  PBS_DEVICE void Score(int column, Scores& scores) const {
    PBS_NO_UNROLL
    for (int token = 0; token < params_.stride; ++token) {
      SyncThreads();  // nobody reads the last tiles, or the pairs in their place
      Load(column, token);
      CopyAsyncWait<0>();
      SyncThreads();
      MultiplyKeys<Element, kRowTiles>(s_.q, ThreadIndex() / 32 * 32, s_.k,
                                       ThreadIndex() % 32, scores);
    }
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < kScoredKeys / 2; ++i) {
        const int at = column + i / 4 * 8 + ThreadIndex() % 4 * 2 + i % 2;
        if (at >= visible_[t][i / 2 % 2]) scores[t][i] = -kInfinity;
      }
    }
  }

  PBS_DEVICE float ScaleLog2() const {
    return kLog2E /
           (Sqrt(static_cast<float>(kHeadDim)) * static_cast<float>(params_.stride));
  }

  // Fills the masses of the key blocks that hold the columns.
  PBS_DEVICE void Measure(int blocks, int columns) {
    CountVisible(blocks * per_block_);
    OnlineSoftmax sums[kRowTiles];
    for (OnlineSoftmax& sum : sums) sum.Reset();
    // One loop for both passes: the code of the products is there once.
    const int tiles = (columns + kScoredKeys - 1) / kScoredKeys;
    PBS_NO_UNROLL
    for (int step = 0; step < 2 * tiles; ++step) {
      if (step == tiles) Weigh(sums);
      const int column = step % tiles * kScoredKeys;
      Scores scores = {};
      Score(column, scores);
      if (step >= tiles) {
        ShareMasses(column, scores);
        continue;
      }
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        sums[t].template Add<true>(ScaleLog2(), scores[t]);
      }
    }
  }

  // Fills shift_ and weight_. Sets the flag where a row's scores are not finite.
  PBS_DEVICE void Weigh(const OnlineSoftmax (&sums)[kRowTiles]) {
    bool finite = true;
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float sum = sums[t].RowSum(r);
        const bool counts = visible_[t][r] > 0;
        finite = finite && (!counts || (sum > 0 && sum < kInfinity));
        shift_[t][r] = counts ? sums[t].max[r] * ScaleLog2() : 0.0f;
        weight_[t][r] = counts ? 1.0f / sum : 0.0f;
      }
    }
    if (!finite) StoreGlobal(params_.non_finite, 1);
  }

  // Fills the masses of the key blocks of a tile.
  PBS_DEVICE void ShareMasses(int column, const Scores& scores) const {
    SyncThreads();  // nobody reads the queries, in whose place the pairs are
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < kScoredKeys / 2; i += 2) {
        const int r = i / 2 % 2;
        const float shift = shift_[t][r];
        const float pair = Exp2(scores[t][i] * ScaleLog2() - shift) +
                           Exp2(scores[t][i + 1] * ScaleLog2() - shift);
        StoreShared(s_.pairs() + PairAt(Row(t, r), i / 4 * 4 + ThreadIndex() % 4),
                    pair * weight_[t][r]);
      }
    }
    SyncThreads();
    SumPairs(column / per_block_);
  }

  // The rows of a pair are turned, so that the eight of a fragment are in other banks.
  PBS_DEVICE static int PairAt(int row, int pair) {
    return row * kPairs + (pair + 4 * row) % kPairs;
  }

  // Masses of all query blocks with the key blocks of a tile, of which the first is
  // `first_key_block`. A group of threads has one of each.
  PBS_DEVICE void SumPairs(int first_key_block) const {
    const int key_blocks = kScoredKeys / per_block_;
    const int all = params_.group_blocks * key_blocks;
    const int threads = all < 4 ? 32 : all < kThreads ? kThreads / all : 1;
    const int width = per_block_ / 2;
    for (int first = 0; first < all; first += kThreads / threads) {
      const int at = first + ThreadIndex() / threads;
      float sum = 0;
      if (at < all) {
        const int first_row = at / key_blocks * per_block_;
        const int first_pair = at % key_blocks * width;
        for (int i = ThreadIndex() % threads; i < per_block_ * width; i += threads) {
          sum += LoadShared(s_.pairs() +
                            PairAt(first_row + i / width, first_pair + i % width));
        }
      }
      for (int mask = 1; mask < threads; mask *= 2) sum += ShuffleXor(sum, mask);
      if (at < all && ThreadIndex() % threads == 0) {
        StoreShared(Masses(at / key_blocks) + first_key_block + at % key_blocks, sum);
      }
    }
  }

  PBS_DEVICE float* Masses(int i) const {
    return s_.masses() + i * params_.logit_stride;
  }

  // Takes the mass of a block out of a row. One warp calls.
  PBS_DEVICE static float TakeOut(float* masses, int block) {
    float mass = 0;
    if (ThreadIndex() % 32 == block % 32) {
      mass = LoadShared(masses + block);
      StoreShared(masses + block, 0.0f);
    }
    return Shuffle(mass, block % 32);
  }

  // What is kept beside the forced blocks. These count first and lose their mass here,
  // so that the others alone are ranked.
  PBS_DEVICE MassCut Cut(float* masses, int block, int candidates) const {
    const float threshold = ThresholdOf(params_, head_, 0);
    if (candidates == 0 || threshold >= 1) return SelectsAll();
    float wanted = threshold * MassFrom(masses, candidates, 0);
    const bool lags = params_.lags != 0 && block < FirstChunkBlocks(sequence_.k_len);
    if (block < candidates) wanted -= TakeOut(masses, block);
    const int first =
        params_.force_first_block != 0
            ? LoadGlobal(params_.first_block +
                         head_ / Members(params_) * params_.num_sequences +
                         sequence_index_)
            : -1;
    if (first >= 0 && first < candidates && first != block && !lags) {
      wanted -= TakeOut(masses, first);
    }
    const MassCut cut = wanted > 0
                            ? CutByMass(masses, candidates, wanted, kInfinityBits)
                            : SelectsNone();
    return lags ? WithNext(cut, masses, candidates) : cut;
  }

  // The same and the next smaller one: as published, the mass of one block less counts.
  PBS_DEVICE static MassCut WithNext(MassCut cut, const float* masses, int count) {
    if (cut.least == 0) return cut;
    int ties = 0;
    float next = 0;
    for (int i = ThreadIndex() % 32; i < count; i += 32) {
      const float mass = LoadShared(masses + i);
      if (FloatBits(mass) == cut.least) ++ties;
      if (FloatBits(mass) < cut.least) next = Max(next, mass);
    }
    for (int mask = 1; mask < 32; mask *= 2) {
      ties += ShuffleXor(ties, mask);
      next = Max(next, ShuffleXor(next, mask));
    }
    if (cut.ties < ties) return {cut.least, cut.ties + 1};
    return {FloatBits(next), 1};
  }

  PBS_DEVICE void Write(int i) const {
    float* masses = Masses(i);
    const int block = Block(i);
    const int candidates = NumCandidates(params_, block);
    MassCut cut = Cut(masses, block, candidates);
    WriteList(params_, sequence_, {head_, sequence_index_, first_ + i},
              [&](int key_block, bool is_earlier) {
                return IsSelected(masses, cut, key_block, is_earlier);
              });
  }

  const SelectionParams& params_;
  AntidiagonalShared<kHeadDim>& s_;
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_;      // first query block of the group, in the sequence
  const int per_block_;  // strided rows of a block
  const int first_row_;  // strided row 0 of the group, absolute
  // Of the thread's rows: visible columns; the largest logit in base two; 1 / the sum.
  int visible_[kRowTiles][2];
  float shift_[kRowTiles][2];
  float weight_[kRowTiles][2];
};

}  // namespace pbs::cuda
