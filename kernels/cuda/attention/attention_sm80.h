// Block-sparse attention for Ampere and later. Four warps share a tile of keys, then a
// tile of values, which asynchronous copies load (docs/KERNELS.md, "Ampere").
//
// Grid: kParts blocks per tile, in the tiles' order. Values are loaded while scores are
// computed, and the next keys are loaded while values are multiplied. Each has one
// buffer, so that two thread blocks fit a multiprocessor.
#pragma once

#include "cuda/attention/attention_rows.h"
#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"
#include "cuda/tiles/row_operand.h"
#include "cuda/tiles/score_tile.h"
#include "cuda/tiles/shared_rows.h"
#include "cuda/tiles/value_tile.h"

namespace pbs::cuda {

template <class ElementType, int kHeadDimension>
struct Sm80Config {
  using Element = ElementType;
  static constexpr int kHeadDim = kHeadDimension;  // 64, 96, 128 or 256
  static constexpr int kThreads = 128;
  // Sixteen-row fragments of a warp. With two, each key is read once for twice the
  // rows; their sums must fit the registers.
  static constexpr int kRowTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = 4 * kWarpRows;  // query rows of a thread block
  static constexpr int kParts = kTileRows / kRows;
  static constexpr int kKeys = 64;  // keys of one step
};

struct Sm80Operands {
  RowOperand q, k, v;
};

template <class Config>
struct alignas(128) Sm80Shared {
  SharedRows<Config::kRows, Config::kHeadDim> q;
  SharedRows<Config::kKeys, Config::kHeadDim> k, v;
  AttentionTile tile;
  // Bits of the keys of a block that each group of rows reads, where it reads a part.
  uint32_t read[kGroupsOfTile][kBlockKeys / 32];
};

template <class Config>
class Sm80Block {
 public:
  PBS_DEVICE Sm80Block(const AttentionParams& params, const Sm80Operands& operands,
                       Sm80Shared<Config>& shared)
      : params_(params),
        operands_(operands),
        s_(shared),
        first_row_(BlockIndex() % Config::kParts * Config::kRows),
        warp_(ThreadIndex() / 32),
        lane_(ThreadIndex() % 32) {}

  PBS_DEVICE void Run() {
    if (ThreadIndex() == 0) {
      StoreShared(&s_.tile, LoadGlobal(params_.tiles + BlockIndex() / Config::kParts));
    }
    SyncThreads();
    PBS_UNROLL
    for (int t = 0; t < Config::kRowTiles; ++t) {
      softmax_[t].Reset();
      PBS_UNROLL
      for (int i = 0; i < Config::kHeadDim / 2; ++i) out_[t][i] = 0;
    }
    LoadQueries();
    LoadKeys(operands_.k, s_.k, 0);
    CopyAsyncCommit();
    StorePart(0);
    const int steps = kHalves * LoadShared(&s_.tile.list_count);
    const int masked = kHalves * LoadShared(&s_.tile.num_masked);
    PBS_NO_UNROLL
    for (int step = 0; step < steps; ++step) Step(step, steps, step < masked);
    PBS_UNROLL
    for (int t = 0; t < Config::kRowTiles; ++t) {
      const AttentionTile tile = LoadShared(&s_.tile);
      StoreRows<Element>(params_, tile, Row(t), lane_, softmax_[t], out_[t]);
      StoreLse(params_, tile, Row(t), lane_, softmax_[t]);
    }
  }

 private:
  using Element = typename Config::Element;
  using Keys = SharedRows<Config::kKeys, Config::kHeadDim>;
  static constexpr int kHalves = kBlockKeys / Config::kKeys;  // steps of a block
  // By itself the compiler sums probabilities after the products of values, so that
  // both are live at the same time; 128 columns leave too few registers for that.
  static constexpr bool kSumsFirst = kDelaysSums && Config::kHeadDim == 128;

  PBS_DEVICE void LoadQueries() {
    const RowOperand& q = operands_.q;
    const AttentionTile tile = LoadShared(&s_.tile);
    s_.q.template Load<Config::kThreads>(
        q.data + q.strides.Offset(tile.sequence, tile.q_begin, tile.head,
                                  tile.first_query + first_row_),
        q.strides.row, tile.begin_row - first_row_, tile.end_row - first_row_);
  }

  // First slot, in the sequence, of the keys of a step.
  PBS_DEVICE int FirstSlot(const AttentionTile& tile, int step) const {
    // Lists are read from their end.
    const int block =
        ListEntry(params_, tile.list_begin, tile.list_count - 1 - step / kHalves);
    return block * kBlockKeys + (kHalves - 1 - step % kHalves) * Config::kKeys;
  }

  PBS_DEVICE void LoadKeys(const RowOperand& operand, Keys& target, int step) {
    const AttentionTile tile = LoadShared(&s_.tile);
    const int slot = FirstSlot(tile, step);
    target.template Load<Config::kThreads>(
        operand.data + operand.strides.Offset(tile.sequence, tile.first_slot,
                                              tile.order_head, slot),
        operand.strides.row, 0, tile.num_keys - slot);
  }

  PBS_DEVICE void Step(int step, int steps, bool masked) {
    CopyAsyncWait<0>();
    SyncThreads();  // keys are there, and nobody reads the last values
    LoadKeys(operands_.v, s_.v, step);
    CopyAsyncCommit();
    BeginScores(step, masked);
    MultiplyKeys<Element, Config::kRowTiles>(s_.q, warp_ * Config::kWarpRows, s_.k,
                                             lane_, scores_);
    CopyAsyncWait<0>();
    SyncThreads();  // values are there, and nobody reads these keys
    if (step + 1 < steps) LoadKeys(operands_.k, s_.k, step + 1);
    CopyAsyncCommit();
    PBS_UNROLL
    for (int t = 0; t < Config::kRowTiles; ++t) {
      softmax_[t].template Add<true>(params_.scale_log2, scores_[t]);
      if (kSumsFirst) PinBeforeWait(softmax_[t].sum[0], softmax_[t].sum[1]);
      softmax_[t].Rescale(out_[t]);
    }
    MultiplyValues<Element, Config::kRowTiles>(scores_, s_.v, lane_, out_);
    // Here the fewest registers are in use.
    if (step % kHalves == kHalves - 1 && step + 1 < steps) StorePart(step + 1);
  }

  PBS_DEVICE bool ReadsParts(const AttentionTile& tile) const {
    return params_.parts != nullptr && tile.list_begin >= 0;
  }
  // Stores the part of the block of a step, for the steps of the block.
  PBS_DEVICE void StorePart(int step) {
    constexpr int kWords = kBlockKeys / 32;
    const AttentionTile tile = LoadShared(&s_.tile);
    if (!ReadsParts(tile) || ThreadIndex() >= kGroupsOfTile * kWords) return;
    const int group = ThreadIndex() / kWords;
    const int word = ThreadIndex() % kWords;
    const int64_t entry = tile.list_begin + tile.list_count - 1 - step / kHalves;
    const PartOfBlock part = LoadPart(params_, entry, group, tile.head, tile.first_slot,
                                      FirstSlot(tile, step) / kBlockKeys, word);
    StoreShared(&s_.read[group][word], part.Bits(word));
  }

  // Scores are masked before the products are added: -inf plus a finite product is
  // -inf, and fewer registers are in use at that point.
  PBS_DEVICE void BeginScores(int step, bool masked) {
    PBS_UNROLL
    for (int t = 0; t < Config::kRowTiles; ++t) {
      PBS_UNROLL
      for (int i = 0; i < Config::kKeys / 2; ++i) scores_[t][i] = 0;
    }
    if (!masked) return;
    const AttentionTile tile = LoadShared(&s_.tile);
    Int2 keys[Config::kKeys / 8];
    LoadPositions(params_, tile.order_head, tile.first_slot, FirstSlot(tile, step),
                  lane_, keys);
    if (ReadsParts(tile)) {
      constexpr int kWords = Config::kKeys / 32;
      const int group = (first_row_ + warp_ * Config::kWarpRows) / kRowGroup;
      uint32_t bits[kWords];
      PBS_UNROLL
      for (int i = 0; i < kWords; ++i) {
        bits[i] =
            LoadShared(&s_.read[group][(kHalves - 1 - step % kHalves) * kWords + i]);
      }
      HideUnread(bits, lane_, keys);
    }
    PBS_UNROLL
    for (int t = 0; t < Config::kRowTiles; ++t) {
      MaskRows(keys, tile.first_position + Row(t), scores_[t]);
    }
  }

  // Row of the tile where fragment `t` of the thread begins.
  PBS_DEVICE int Row(int t) const {
    return first_row_ + warp_ * Config::kWarpRows + t * 16 + lane_ / 4;
  }

  const AttentionParams& params_;
  const Sm80Operands& operands_;
  Sm80Shared<Config>& s_;
  const int first_row_;  // of the thread block, in the tile
  const int warp_;
  const int lane_;
  float scores_[Config::kRowTiles][Config::kKeys / 2];
  float out_[Config::kRowTiles][Config::kHeadDim / 2];
  OnlineSoftmax softmax_[Config::kRowTiles];
};

template <class Config>
PBS_DEVICE void AttendSm80(const AttentionParams& params,
                           const Sm80Operands& operands) {
  auto& shared = *reinterpret_cast<Sm80Shared<Config>*>(SharedMemory());
  Sm80Block<Config>(params, operands, shared).Run();
}

}  // namespace pbs::cuda
