// Importance of keys: the mean, over the last queries of a sequence, of the softmax of
// their scores with the keys of whole segments (arXiv 2510.21270, section 3.2). It has
// three kernels: sums over each chunk of keys, the weight of each query, the importance
// of the keys.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"
#include "cuda/tiles/online_softmax.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"

namespace pbs::cuda {

// The importance of a chunk's keys follows it in shared memory.
template <int kHeadDim>
struct alignas(128) ScoreShared {
  SharedRows<kProxies, kHeadDim> q;
  SharedRows<kScoredKeys, kHeadDim> k[KeyBuffers(kHeadDim)];
  float column_sums[4][kScoredKeys];  // indexed by warp

  PBS_DEVICE float* importance() { return reinterpret_cast<float*>(this + 1); }
};

// A chunk of keys of one sequence, scored by 128 threads.
template <class Element, int kHeadDim>
class KeyChunk {
 public:
  static constexpr int kRowTiles = 2;  // a warp has 32 proxies
  static_assert(sizeof(ScoreShared<kHeadDim>) == ScoreSharedBytes(kHeadDim, 0));

  PBS_DEVICE KeyChunk(const SelectionParams& params, int chunk)
      : params_(params),
        s_(*reinterpret_cast<ScoreShared<kHeadDim>*>(SharedMemory())),
        sequence_index_(FindSequence<&SequenceRecord::chunk_begin>(
            params.sequences, params.num_sequences, chunk)),
        sequence_(LoadGlobal(params.sequences + sequence_index_)),
        first_block_((chunk - sequence_.chunk_begin) * params.chunk_blocks) {}

  PBS_DEVICE int sequence_index() const { return sequence_index_; }
  // First slot of the chunk over all sequences, one head.
  PBS_DEVICE int64_t first_slot() const {
    return int64_t{sequence_.key_block_begin + first_block_} * kBlockTokens;
  }
  PBS_DEVICE int num_keys() const {
    const int left = sequence_.scored_blocks - first_block_;
    return (left < params_.chunk_blocks ? left : params_.chunk_blocks) * kBlockTokens;
  }
  // Factor that converts logits to base two.
  PBS_DEVICE float ScaleLog2() const {
    return params_.key_rounding == ScoreRounding::kNone ? kLog2E / Root() : kLog2E;
  }

  // Calls use(first key of the chunk, scores) for every kScoredKeys keys.
  template <class Use>
  PBS_DEVICE void Score(int head, Use&& use) {
    SyncThreads();  // no thread reads the last head's queries
    const int first_proxy = sequence_.q_len < kProxies ? 0 : sequence_.q_len - kProxies;
    s_.q.template Load<128>(
        params_.q.data + params_.q.strides.Offset(sequence_index_, sequence_.q_begin,
                                                  head, first_proxy),
        params_.q.strides.row, 0, sequence_.q_len - first_proxy);
    LoadKeys(head, 0);
    PBS_NO_UNROLL
    for (int key = 0; key < num_keys(); key += kScoredKeys) {
      CopyAsyncWait<0>();
      SyncThreads();  // keys are there, and nobody reads the last ones
      if (kBuffers > 1) LoadKeys(head, key + kScoredKeys);
      float scores[kRowTiles][kScoredKeys / 2] = {};
      MultiplyKeys<Element, kRowTiles>(s_.q, ThreadIndex() / 32 * 32, Buffer(key),
                                       ThreadIndex() % 32, scores);
      if (kBuffers == 1) {
        SyncThreads();  // the next keys may come
        LoadKeys(head, key + kScoredKeys);
      }
      if (params_.key_rounding == ScoreRounding::kInputDType) Round(scores);
      use(key, scores);
    }
  }

 private:
  using Keys = SharedRows<kScoredKeys, kHeadDim>;
  static constexpr int kBuffers = KeyBuffers(kHeadDim);

  PBS_DEVICE Keys& Buffer(int key) const { return s_.k[key / kScoredKeys % kBuffers]; }

  // Starts to load the tile at `key` of the chunk, if there is one.
  PBS_DEVICE void LoadKeys(int head, int key) const {
    if (key >= num_keys()) return;
    Buffer(key).template Load<128>(
        params_.k.data + params_.k.strides.Offset(sequence_index_, sequence_.k_begin,
                                                  head / GroupSize(params_),
                                                  first_block_ * kBlockTokens + key),
        params_.k.strides.row, 0, kScoredKeys);
    CopyAsyncCommit();
  }

  PBS_DEVICE static float Root() { return Sqrt(static_cast<float>(kHeadDim)); }

  PBS_DEVICE void Round(float (&scores)[kRowTiles][kScoredKeys / 2]) const {
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < kScoredKeys / 2; ++i) {
        scores[t][i] = Element::Round(Element::Round(scores[t][i]) / Root());
      }
    }
  }

  const SelectionParams& params_;
  ScoreShared<kHeadDim>& s_;
  const int sequence_index_;
  const SequenceRecord sequence_;
  const int first_block_;
};

// Proxy of register pair `r` of fragment `t`.
PBS_DEVICE int ProxyRow(int t, int r) {
  return ThreadIndex() / 32 * 32 + t * 16 + ThreadIndex() % 32 / 4 + r * 8;
}

// Stores the largest logit and the sum of each proxy. A thread block has one chunk of
// one head.
template <int kRowTiles>
PBS_DEVICE void StoreChunkSums(const SelectionParams& params,
                               const OnlineSoftmax (&sums)[kRowTiles],
                               float scale_log2) {
  PBS_UNROLL
  for (int t = 0; t < kRowTiles; ++t) {
    PBS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = sums[t].RowSum(r);
      if (ThreadIndex() % 4 != 0) continue;
      const int64_t at = int64_t{BlockIndex()} * kProxies + ProxyRow(t, r);
      StoreGlobal(params.chunk_max + at, sums[t].max[r] * scale_log2);
      StoreGlobal(params.chunk_sum + at, sum);
    }
  }
}

// Grid [num_heads, total_chunks], 128 threads.
template <class Element, int kHeadDim>
struct SumChunks {
  static constexpr int kThreads = 128;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    using Chunk = KeyChunk<Element, kHeadDim>;
    const GridPlace place = PlaceInGrid(params.total_chunks);
    Chunk chunk(params, place.item);
    OnlineSoftmax sums[Chunk::kRowTiles];
    for (OnlineSoftmax& sum : sums) sum.Reset();
    chunk.Score(place.head, [&](int, auto& scores) {
      PBS_UNROLL
      for (int t = 0; t < Chunk::kRowTiles; ++t) {
        sums[t].template Add<false>(chunk.ScaleLog2(), scores[t]);
      }
    });
    StoreChunkSums(params, sums, chunk.ScaleLog2());
  }
};

// Where the sums of a sequence's chunks are, and which rows of their tiles are queries.
struct SummedChunks {
  int64_t first;  // chunk, of all heads
  int count;
  int begin_row;
  int end_row;
  int mean_of;  // what the weight is divided by
};

// Grid [num_heads, num_sequences, kParts], 512 threads. Each lane has a proxy, and each
// warp every 16th chunk. Dynamic shared memory: kSharedBytes.
class WeighProxies {
 public:
  static constexpr int kWarps = 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kParts = kProxies / 32;
  static constexpr int kSharedBytes = 2 * kThreads * 4;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const GridPlace place = PlaceInGrid(params.num_sequences * kParts);
    const SequenceRecord s = LoadGlobal(params.sequences + place.item / kParts);
    const int num_proxies = s.q_len < kProxies ? s.q_len : kProxies;
    Weigh(params, place,
          {.first = int64_t{place.head} * params.total_chunks + s.chunk_begin,
           .count = (s.scored_blocks + params.chunk_blocks - 1) / params.chunk_blocks,
           .begin_row = 0,
           .end_row = num_proxies,
           .mean_of = num_proxies * Members(params)});
  }

  PBS_DEVICE static void Weigh(const SelectionParams& params, const GridPlace& place,
                               const SummedChunks& chunks) {
    if (chunks.count == 0) return;
    const int warp = ThreadIndex() / 32;
    const int row = place.item % kParts * 32 + ThreadIndex() % 32;
    const int64_t at = chunks.first * kProxies + row;
    float top = -kInfinity;
    for (int i = warp; i < chunks.count; i += kWarps) {
      top = Max(top, LoadGlobal(params.chunk_max + at + i * kProxies));
    }
    auto* tops = reinterpret_cast<float*>(SharedMemory());
    top = OfAllWarps(tops, top, [](float a, float b) { return Max(a, b); });
    float sum = 0;
    for (int i = warp; i < chunks.count; i += kWarps) {
      sum += LoadGlobal(params.chunk_sum + at + i * kProxies) *
             Exp2(LoadGlobal(params.chunk_max + at + i * kProxies) - top);
    }
    sum = OfAllWarps(tops + kThreads, sum, [](float a, float b) { return a + b; });
    if (warp != 0) return;
    const bool counts = row >= chunks.begin_row && row < chunks.end_row;
    // Comparisons with NaN are false.
    const bool finite = top > -kInfinity && top < kInfinity && sum < kInfinity;
    if (counts && !finite) StoreGlobal(params.non_finite, 1);
    const int64_t target =
        (int64_t{place.head} * params.num_sequences + place.item / kParts) * kProxies +
        row;
    StoreGlobal(params.proxy_shift + target, counts ? top : 0.0f);
    StoreGlobal(params.proxy_weight + target,
                counts ? 1.0f / (sum * static_cast<float>(chunks.mean_of)) : 0.0f);
  }

 private:
  // Combines the values of a lane in all warps, in order. Each thread gets the result.
  template <class Combine>
  PBS_DEVICE static float OfAllWarps(float* shared, float value, Combine&& combine) {
    StoreShared(shared + ThreadIndex(), value);
    SyncThreads();
    float all = LoadShared(shared + ThreadIndex() % 32);
    PBS_UNROLL
    for (int warp = 1; warp < kWarps; ++warp) {
      all = combine(all, LoadShared(shared + warp * 32 + ThreadIndex() % 32));
    }
    return all;
  }
};

// Grid [num_order_heads, total_chunks], 128 threads.
template <class Element, int kHeadDim>
class ShareImportance {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kResidentBlocks = KeyBuffers(kHeadDim) > 1 ? 3 : 2;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const GridPlace place = PlaceInGrid(params.total_chunks);
    ShareImportance(params, place.item).Run(place.head);
  }

 private:
  using Chunk = KeyChunk<Element, kHeadDim>;

  PBS_DEVICE ShareImportance(const SelectionParams& params, int chunk)
      : params_(params),
        s_(*reinterpret_cast<ScoreShared<kHeadDim>*>(SharedMemory())),
        chunk_(params, chunk) {}

  PBS_DEVICE void Run(int order_head) {
    for (int key = ThreadIndex(); key < chunk_.num_keys(); key += kThreads) {
      StoreShared(s_.importance() + key, 0.0f);
    }
    const int members = Members(params_);
    for (int member = 0; member < members; ++member) {
      AddMember(order_head * members + member);
    }
    SyncThreads();
    float* target = params_.importance +
                    int64_t{order_head} * params_.total_key_blocks * kBlockTokens +
                    chunk_.first_slot();
    for (int key = ThreadIndex(); key < chunk_.num_keys(); key += kThreads) {
      StoreGlobal(target + key, LoadShared(s_.importance() + key));
    }
  }

  PBS_DEVICE void AddMember(int head) {
    float shift[Chunk::kRowTiles][2];
    float weight[Chunk::kRowTiles][2];
    PBS_UNROLL
    for (int t = 0; t < Chunk::kRowTiles; ++t) {
      PBS_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int64_t at =
            (int64_t{head} * params_.num_sequences + chunk_.sequence_index()) *
                kProxies +
            ProxyRow(t, r);
        shift[t][r] = LoadGlobal(params_.proxy_shift + at);
        weight[t][r] = LoadGlobal(params_.proxy_weight + at);
      }
    }
    chunk_.Score(head, [&](int first_key, auto& scores) {
      PBS_UNROLL
      for (int column = 0; column < kScoredKeys / 4; ++column) {
        const int at = column / 2 * 4 + column % 2;  // index of row pair 0
        float share = 0;
        PBS_UNROLL
        for (int t = 0; t < Chunk::kRowTiles; ++t) {
          PBS_UNROLL
          for (int r = 0; r < 2; ++r) {
            share += weight[t][r] *
                     Exp2(scores[t][at + 2 * r] * chunk_.ScaleLog2() - shift[t][r]);
          }
        }
        share += ShuffleXor(share, 4);
        share += ShuffleXor(share, 8);
        share += ShuffleXor(share, 16);
        const int lane = ThreadIndex() % 32;
        if (lane < 4) {
          StoreShared(&s_.column_sums[ThreadIndex() / 32]
                                     [column / 2 * 8 + lane * 2 + column % 2],
                      share);
        }
      }
      SyncThreads();
      if (ThreadIndex() < kScoredKeys) {
        float* sum = s_.importance() + first_key + ThreadIndex();
        float added = LoadShared(sum);
        PBS_UNROLL
        for (int warp = 0; warp < 4; ++warp) {
          added += LoadShared(&s_.column_sums[warp][ThreadIndex()]);
        }
        StoreShared(sum, added);
      }
    });
  }

  const SelectionParams& params_;
  ScoreShared<kHeadDim>& s_;
  Chunk chunk_;
};

}  // namespace pbs::cuda
