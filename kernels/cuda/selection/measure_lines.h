// The attention of the last queries of a sequence, summed by key slot (columns) and by
// distance between query and key (diagonals), for minference and flexprefill (arXiv
// 2502.20766). It has three kernels: sums over each chunk of keys, the weight of each
// query, the sums of the probabilities.
//
// The last query is in the last row of a tile, so that column and row of a score give
// its diagonal: slot + 127 - row.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/diagonals.h"
#include "cuda/selection/score_keys.h"
#include "cuda/selection/sequences.h"
#include "cuda/selection/slot_keys.h"
#include "cuda/selection/stamp_time.h"
#include "cuda/tiles/online_softmax.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// The diagonals of the chunk follow it in shared memory.
template <int kHeadDim>
struct alignas(128) LinesShared {
  using Keys = SharedRows<kScoredKeys, kHeadDim>;
  static constexpr int kSharesBytes = kProxies * kSharesPitch * 4;

  SharedRows<kProxies, kHeadDim> q;
  alignas(128) uint8_t tile[sizeof(Keys) > kSharesBytes ? sizeof(Keys) : kSharesBytes];

  PBS_DEVICE Keys& keys() { return *reinterpret_cast<Keys*>(tile); }
  // Probabilities of a tile, [kProxies, kSharesPitch], in the place of its keys.
  PBS_DEVICE float* shares() { return reinterpret_cast<float*>(tile); }
  PBS_DEVICE float* diagonals() { return reinterpret_cast<float*>(this + 1); }
};

// Row of a tile where the queries of a sequence begin.
PBS_DEVICE int FirstLineRow(const SelectionParams& params, const SequenceRecord& s) {
  const int queries = params.lines.num_queries;
  return kProxies - (s.q_len < queries ? s.q_len : queries);
}

// A chunk of key slots of one sequence, scored with the last queries of one head by 128
// threads.
template <class Element, int kHeadDim>
class LineChunk {
 public:
  static constexpr int kRowTiles = 2;  // a warp has 32 queries
  using Scores = float[kRowTiles][kScoredKeys / 2];
  static_assert(sizeof(LinesShared<kHeadDim>) ==
                LinesSharedBytes(kHeadDim, 0) - kBlockTokens * 4);

  PBS_DEVICE LineChunk(const SelectionParams& params, const GridPlace& place)
      : params_(params),
        s_(*reinterpret_cast<LinesShared<kHeadDim>*>(SharedMemory())),
        head_(place.head),
        sequence_index_(FindSequence<&SequenceRecord::line_chunk_begin>(
            params.sequences, params.num_sequences, place.item)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_block_((place.item - sequence_.line_chunk_begin) * params.chunk_blocks),
        first_row_(FirstLineRow(params, sequence_)),
        keys_(SlotKeysOf(params, sequence_, sequence_index_,
                         place.head / Members(params))) {}

  PBS_DEVICE int head() const { return head_; }
  PBS_DEVICE int sequence_index() const { return sequence_index_; }
  PBS_DEVICE LinesShared<kHeadDim>& shared() const { return s_; }
  PBS_DEVICE int num_keys() const {
    const int left = sequence_.num_key_blocks - first_block_;
    return (left < params_.chunk_blocks ? left : params_.chunk_blocks) * kBlockTokens;
  }
  // First slot of the chunk, over all heads and sequences.
  PBS_DEVICE int64_t first_slot() const {
    return FirstLine(params_, sequence_, head_) + int64_t{first_block_} * kBlockTokens;
  }
  // Calls use(first key of the chunk, scores) for every kScoredKeys keys.
  // Tells of scores that are not finite.
  template <class Use>
  PBS_DEVICE void Score(Use&& use) {
    const int first_query = sequence_.q_len - kProxies;  // may be negative
    s_.q.template Load<128>(
        params_.q.data + params_.q.strides.Offset(sequence_index_, sequence_.q_begin,
                                                  head_, first_query),
        params_.q.strides.row, first_row_, kProxies);
    PBS_NO_UNROLL
    for (int key = 0; key < num_keys(); key += kScoredKeys) {
      SyncThreads();  // nobody reads the last keys, or the shares in their place
      const int slot = first_block_ * kBlockTokens + key;
      s_.keys().template Load<128>(keys_.first + slot * keys_.stride, keys_.stride, 0,
                                   sequence_.k_len - slot);
      CopyAsyncCommit();
      CopyAsyncWait<0>();
      SyncThreads();
      Scores scores = {};
      MultiplyKeys<Element, kRowTiles>(s_.q, ThreadIndex() / 32 * 32, s_.keys(),
                                       ThreadIndex() % 32, scores);
      if (!Mask(slot, scores)) StoreGlobal(params_.non_finite, 1);
      use(key, scores);
    }
  }

 private:
  // Scores of queries before the key become -inf. All queries see what lies before the
  // segment of the first one. False when a score that a query sees is not finite.
  PBS_DEVICE bool Mask(int slot, Scores& scores) const {
    const int segment_end = (slot / params_.segment_size + 1) * params_.segment_size;
    const int first_position = sequence_.k_len - kProxies;
    float zero = 0;  // NaN after a score that is not finite
    if (segment_end <= first_position) {
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        PBS_UNROLL
        for (int i = 0; i < kScoredKeys / 2; ++i) zero += 0.0f * scores[t][i];
      }
      return zero == 0;
    }
    PBS_UNROLL
    for (int column = 0; column < kScoredKeys / 4; ++column) {
      const int at = column / 2 * 4 + column % 2;  // index of row pair 0
      const int position =
          Position(slot + column / 2 * 8 + ThreadIndex() % 4 * 2 + column % 2);
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        PBS_UNROLL
        for (int r = 0; r < 2; ++r) {
          float& score = scores[t][at + 2 * r];
          if (position > first_position + ProxyRow(t, r)) {
            score = -kInfinity;
          } else {
            zero += 0.0f * score;
          }
        }
      }
    }
    return zero == 0;
  }

  // Original position of the key in a slot; after all queries when there is none.
  PBS_DEVICE int Position(int slot) const {
    if (params_.permutes == 0) return slot;
    return LoadGlobal(params_.positions +
                      (int64_t{head_ / Members(params_)} * params_.copied_blocks +
                       sequence_.key_block_begin) *
                          kBlockTokens +
                      slot);
  }

  const SelectionParams& params_;
  LinesShared<kHeadDim>& s_;
  const int head_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_block_;
  const int first_row_;
  const SlotKeys keys_;
};

// Grid [num_heads, lines.total_chunks], 128 threads. Dynamic shared memory:
// LinesSharedBytes().
template <class Element, int kHeadDim>
struct SumLines {
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    using Chunk = LineChunk<Element, kHeadDim>;
    StampTime(params.ordered);
    Chunk chunk(params, PlaceInGrid(params.lines.total_chunks));
    OnlineSoftmax sums[Chunk::kRowTiles];
    for (OnlineSoftmax& sum : sums) sum.Reset();
    chunk.Score([&](int, auto& scores) {
      PBS_UNROLL
      for (int t = 0; t < Chunk::kRowTiles; ++t) {
        sums[t].template Add<true>(params.lines.scale_log2, scores[t]);
      }
    });
    StoreChunkSums(params, sums, params.lines.scale_log2);
  }
};

// Grid, threads and shared memory as WeighProxies.
struct WeighLines {
  static constexpr int kThreads = WeighProxies::kThreads;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const GridPlace place = PlaceInGrid(params.num_sequences * WeighProxies::kParts);
    const SequenceRecord s =
        LoadGlobal(params.sequences + place.item / WeighProxies::kParts);
    const int first_row = FirstLineRow(params, s);
    WeighProxies::Weigh(
        params, place,
        {.first = int64_t{place.head} * params.lines.total_chunks + s.line_chunk_begin,
         .count = LineChunks(s, params.chunk_blocks),
         .begin_row = first_row,
         .end_row = kProxies,
         .mean_of = kProxies - first_row});
  }
};

// Grid [num_heads, lines.total_chunks], 128 threads. Dynamic shared memory:
// LinesSharedBytes().
template <class Element, int kHeadDim>
class ShareLines {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kResidentBlocks = kHeadDim <= 128 ? 3 : 2;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    ShareLines(params).Run();
  }

 private:
  using Chunk = LineChunk<Element, kHeadDim>;
  using Scores = typename Chunk::Scores;
  // Diagonals of a tile: slot - row is in (-128, 64).
  static constexpr int kTileDiagonals = kProxies + kScoredKeys - 1;

  PBS_DEVICE explicit ShareLines(const SelectionParams& params)
      : params_(params),
        chunk_(params, PlaceInGrid(params.lines.total_chunks)),
        shares_(chunk_.shared().shares()),
        diagonals_(chunk_.shared().diagonals()) {}

  PBS_DEVICE void Run() {
    LoadWeights();
    for (int i = ThreadIndex(); i < chunk_.num_keys() + kProxies; i += kThreads) {
      StoreShared(diagonals_ + i, 0.0f);
    }
    chunk_.Score([&](int key, auto& scores) {
      SyncThreads();  // nobody reads the keys, in whose place the shares are
      StoreShares(scores);
      SyncThreads();
      if (ThreadIndex() < kScoredKeys) {
        StoreGlobal(params_.lines.columns + chunk_.first_slot() + key + ThreadIndex(),
                    SumColumn(ThreadIndex()));
      } else if (ThreadIndex() + kScoredKeys < kTileDiagonals) {
        AddDiagonal(key, ThreadIndex() + kScoredKeys);
      }
      AddDiagonal(key, ThreadIndex());
    });
    SyncThreads();
    for (int i = ThreadIndex(); i < chunk_.num_keys(); i += kThreads) {
      StoreGlobal(params_.lines.diagonals + chunk_.first_slot() + i,
                  LoadShared(diagonals_ + i));
    }
    StoreGlobal(params_.lines.rest + int64_t{BlockIndex()} * kProxies + ThreadIndex(),
                LoadShared(diagonals_ + chunk_.num_keys() + ThreadIndex()));
  }

  PBS_DEVICE void LoadWeights() {
    PBS_UNROLL
    for (int t = 0; t < Chunk::kRowTiles; ++t) {
      PBS_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t at =
            (int64_t{chunk_.head()} * params_.num_sequences + chunk_.sequence_index()) *
                kProxies +
            ProxyRow(t, r);
        shift_[t][r] = LoadGlobal(params_.proxy_shift + at);
        weight_[t][r] = LoadGlobal(params_.proxy_weight + at);
      }
    }
  }

  // The threads of a warp are in different banks when they read a diagonal or a column
  // each.
  PBS_DEVICE static int ShareAt(int row, int column) {
    return row * kSharesPitch + column;
  }

  PBS_DEVICE void StoreShares(const Scores& scores) const {
    PBS_UNROLL
    for (int t = 0; t < Chunk::kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < kScoredKeys / 2; ++i) {
        const int r = i / 2 % 2;
        const float share =
            weight_[t][r] *
            Exp2(scores[t][i] * params_.lines.scale_log2 - shift_[t][r]);
        StoreShared(shares_ + ShareAt(ProxyRow(t, r),
                                      i / 4 * 8 + ThreadIndex() % 4 * 2 + i % 2),
                    share);
      }
    }
  }

  PBS_DEVICE float SumColumn(int column) const {
    float sum = 0;
    for (int row = 0; row < kProxies; ++row) {
      sum += LoadShared(shares_ + ShareAt(row, column));
    }
    return sum;
  }

  // Adds a diagonal of the tile at `key` to that of the chunk.
  PBS_DEVICE void AddDiagonal(int key, int diagonal) const {
    const int first = diagonal < kProxies ? 0 : diagonal - kProxies + 1;
    const int last = diagonal < kScoredKeys ? diagonal : kScoredKeys - 1;
    float sum = LoadShared(diagonals_ + key + diagonal);
    for (int column = first; column <= last; ++column) {
      sum += LoadShared(shares_ + ShareAt(kProxies - 1 - diagonal + column, column));
    }
    StoreShared(diagonals_ + key + diagonal, sum);
  }

  const SelectionParams& params_;
  Chunk chunk_;
  float* const shares_;
  float* const diagonals_;
  // Of the thread's queries: the largest logit in base two; 1 / the sum.
  float shift_[Chunk::kRowTiles][2];
  float weight_[Chunk::kRowTiles][2];
};

}  // namespace pbs::cuda
