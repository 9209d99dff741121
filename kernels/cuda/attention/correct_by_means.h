// Mean correction (arXiv 2608.19758), after attention: a key block that a tile does not
// read, and whose keys all come before it, takes part as one key, with the mean of its
// keys, the logit raised by ln(keys), and the mean of its values.
//
// Attention has stored o and lse. They are the state of an online softmax of which o is
// the sum so far, so the means go on from there, and the kernels of attention know
// nothing of means. The price is that o is rounded once more.
#pragma once

#include "cuda/attention/attention_rows.h"
#include "cuda/attention/correction_params.h"
#include "cuda/primitives/primitives.h"
#include "cuda/tiles/online_softmax.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"
#include "cuda/tiles/value_tile.h"

namespace pbs::cuda {

// A byte per key block follows it in shared memory: 1 where the block takes part.
template <int kHeadDim>
struct alignas(128) CorrectionShared {
  SharedRows<CorrectedRows(kHeadDim), kHeadDim> q;
  SharedRows<kMeansTogether, kHeadDim> keys, values;
  AttentionTile tile;

  PBS_DEVICE uint8_t* joins() { return reinterpret_cast<uint8_t*>(this + 1); }
};

// Grid: kParts thread blocks per tile, in the tiles' order. Dynamic shared memory:
// CorrectionSharedBytes(). Copies overlap with products as in attention_sm80.h.
template <class Element, int kHeadDim>
class CorrectByMeans {
 public:
  static constexpr int kThreads = 128;
  static constexpr int kRows = CorrectedRows(kHeadDim);
  static constexpr int kParts = kTileRows / kRows;

  PBS_DEVICE static void Run(const CorrectionParams& params) {
    CorrectByMeans(params).Run();
  }

 private:
  static constexpr int kRowTiles = CorrectedFragments(kHeadDim);
  using Shared = CorrectionShared<kHeadDim>;
  using Means = SharedRows<kMeansTogether, kHeadDim>;
  static_assert(sizeof(Shared) == CorrectionSharedBytes(kHeadDim, 0));

  PBS_DEVICE explicit CorrectByMeans(const CorrectionParams& params)
      : params_(params),
        s_(*reinterpret_cast<Shared*>(SharedMemory())),
        first_row_(BlockIndex() % kParts * kRows),
        lane_(ThreadIndex() % 32) {}

  PBS_DEVICE void Run() {
    if (ThreadIndex() == 0) {
      StoreShared(&s_.tile,
                  LoadGlobal(params_.attention.tiles + BlockIndex() / kParts));
    }
    SyncThreads();
    if (LoadShared(&s_.tile.list_begin) < 0) return;  // it reads every block
    const int blocks = OwnBegin(LoadShared(&s_.tile.first_position) / kBlockTokens,
                                params_.blocks_per_segment);
    if (blocks == 0) return;
    LoadQueries();
    LoadMeans(MeanOperand::kKeys, 0, blocks);
    FindJoining(blocks);
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) Resume(t);
    PBS_NO_UNROLL
    for (int first = 0; first < blocks; first += kMeansTogether) Step(first, blocks);
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      const AttentionTile tile = LoadShared(&s_.tile);
      StoreRows<Element>(params_.attention, tile, Row(t), lane_, softmax_[t], out_[t]);
      StoreLse(params_.attention, tile, Row(t), lane_, softmax_[t]);
    }
  }

  // Row of the thread block where the warp's rows begin.
  PBS_DEVICE static int WarpRow() { return ThreadIndex() / 32 * 16 * kRowTiles; }
  // Row of the tile where fragment `t` of the thread begins.
  PBS_DEVICE int Row(int t) const {
    return first_row_ + WarpRow() + t * 16 + lane_ / 4;
  }

  PBS_DEVICE int KeyBlockBegin(const AttentionTile& tile) const {
    return LoadGlobal(&params_.sequences[tile.sequence].key_block_begin);
  }

  PBS_DEVICE void LoadQueries() const {
    const RowOperand& q = params_.q;
    const AttentionTile tile = LoadShared(&s_.tile);
    s_.q.template Load<kThreads>(
        q.data + q.strides.Offset(tile.sequence, tile.q_begin, tile.head,
                                  tile.first_query + first_row_),
        q.strides.row, tile.begin_row - first_row_, tile.end_row - first_row_);
  }

  // Starts to load the means of the blocks [first, blocks), as many as there is room
  // for.
  PBS_DEVICE void LoadMeans(MeanOperand operand, int first, int blocks) const {
    const AttentionTile tile = LoadShared(&s_.tile);
    const int64_t row =
        FirstMean(params_, tile.order_head, operand) + KeyBlockBegin(tile) + first;
    Means& target = operand == MeanOperand::kKeys ? s_.keys : s_.values;
    target.template Load<kThreads>(params_.means + row * kHeadDim, kHeadDim, 0,
                                   blocks - first);
    CopyAsyncCommit();
  }

  PBS_DEVICE void FindJoining(int blocks) const {
    const AttentionTile tile = LoadShared(&s_.tile);
    const int end = (blocks + kMeansTogether - 1) / kMeansTogether * kMeansTogether;
    for (int block = ThreadIndex(); block < end; block += kThreads) {
      const bool joins = block < blocks && !HasColumns(tile, block);
      StoreShared(s_.joins() + block, static_cast<uint8_t>(joins ? 1 : 0));
    }
    SyncThreads();
    for (int i = ThreadIndex(); i < tile.list_count; i += kThreads) {
      const int block = ListEntry(params_.attention, tile.list_begin, i);
      if (block < blocks) StoreShared(s_.joins() + block, uint8_t{0});
    }
  }

  // Whether columns of a block are chosen. Then every row of a tile that does not list
  // the block reads them: it comes before the last spans of both groups of rows.
  PBS_DEVICE bool HasColumns(const AttentionTile& tile, int block) const {
    if (params_.attention.column_bits == nullptr) return false;
    const auto* words = reinterpret_cast<const Words4*>(
        params_.attention.column_bits + tile.head * params_.attention.column_stride);
    const Words4 chosen = LoadGlobal(words + KeyBlockBegin(tile) + block);
    return (chosen.words[0] | chosen.words[1] | chosen.words[2] | chosen.words[3]) != 0;
  }

  // The state that attention left: weights relative to exp(lse), which add up to 1.
  PBS_DEVICE void Resume(int t) {
    const AttentionParams& a = params_.attention;
    const AttentionTile tile = LoadShared(&s_.tile);
    softmax_[t].Reset();
    PBS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = Row(t) + 8 * r;
      const bool exists = IsStored(tile, row);
      const int query = tile.first_query + row;
      if (exists) {
        const float lse =
            LoadGlobal(a.lse + a.lse_strides.Offset(tile.sequence, tile.q_begin,
                                                    tile.head, query));
        softmax_[t].max[r] = lse * kLog2E / a.scale_log2;
        softmax_[t].sum[r] = lane_ % 4 == 0 ? 1.0f : 0.0f;
      }
      const auto* o = static_cast<const uint16_t*>(a.o) +
                      a.o_strides.Offset(tile.sequence, tile.q_begin, tile.head, query);
      PBS_UNROLL
      for (int i = 0; i < kHeadDim / 8; i += 4) {
        Words4 groups = {};
        if (exists) {
          groups = LoadGlobal(reinterpret_cast<const Words4*>(o + (i + lane_ % 4) * 8));
        }
        groups = TransposeOfQuad(groups, lane_);
        PBS_UNROLL
        for (int j = 0; j < 4; ++j) {
          out_[t][(i + j) * 4 + 2 * r] = Element::Low(groups.words[j]);
          out_[t][(i + j) * 4 + 2 * r + 1] = Element::High(groups.words[j]);
        }
      }
    }
  }

  PBS_DEVICE void Step(int first, int blocks) {
    CopyAsyncWait<0>();
    SyncThreads();  // keys are there, and nobody reads the last values
    LoadMeans(MeanOperand::kValues, first, blocks);
    BeginScores(first);
    MultiplyKeys<Element, kRowTiles>(s_.q, WarpRow(), s_.keys, lane_, scores_);
    CopyAsyncWait<0>();
    SyncThreads();  // values are there, and nobody reads these keys
    const int next = first + kMeansTogether;
    if (next < blocks) LoadMeans(MeanOperand::kKeys, next, blocks);
    PBS_UNROLL
    for (int t = 0; t < kRowTiles; ++t) {
      softmax_[t].template Add<true>(params_.attention.scale_log2, scores_[t]);
      softmax_[t].Rescale(out_[t]);
    }
    MultiplyValues<Element, kRowTiles>(scores_, s_.values, lane_, out_);
  }

  // A mean stands for kBlockTokens keys. The products are added to what is set here.
  PBS_DEVICE void BeginScores(int first) {
    const float raised =
        Log2(static_cast<float>(kBlockTokens)) / params_.attention.scale_log2;
    PBS_UNROLL
    for (int i = 0; i < kMeansTogether / 2; ++i) {
      const int block = first + i / 4 * 8 + lane_ % 4 * 2 + i % 2;
      const bool joins = LoadShared(s_.joins() + block) != 0;
      PBS_UNROLL
      for (int t = 0; t < kRowTiles; ++t) {
        scores_[t][i] = joins ? raised : -kInfinity;
      }
    }
  }

  const CorrectionParams& params_;
  Shared& s_;
  const int first_row_;  // of the thread block, in the tile
  const int lane_;
  float scores_[kRowTiles][kMeansTogether / 2];
  float out_[kRowTiles][kHeadDim / 2];
  OnlineSoftmax softmax_[kRowTiles];
};

}  // namespace pbs::cuda
