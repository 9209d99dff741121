// Block-sparse attention for Hopper: a producer warpgroup feeds boxes of keys and
// values to two consumer warpgroups of 64 query rows each (docs/KERNELS.md, "Hopper").
//
// Grid: any number of blocks of kThreads; tiles are taken from a counter. Lists are
// walked from their end, so that the masked blocks come first and the loop over the
// others has no mask.
#pragma once

#include "cuda/attention/attention_rows.h"
#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

template <class ElementType, int kHeadDimension, int kNumStages, bool kTakesTurns>
struct Sm90Config {
  using Element = ElementType;
  static constexpr int kHeadDim = kHeadDimension;  // 64 or 128
  static constexpr int kStages = kNumStages;       // of keys, and of values
  // The consumers issue their products in turn, one's softmax beside the other's.
  static constexpr bool kPingPong = kTakesTurns;
  static constexpr int kPanels = kHeadDim / 64;  // boxes of 64 columns
  static constexpr int kThreads = 384;
  static constexpr int kOperandBytes = kTileRows * kHeadDim * 2;
};

struct Sm90Operands {
  TensorMap q;  // box of 64 rows
  TensorMap k;  // box of 128 rows
  TensorMap v;
  int32_t q_packed;  // as RowStrides::packed
  int32_t kv_packed;
};

template <class Config>
struct alignas(1024) Sm90Shared {
  uint16_t q[2][Config::kPanels][64 * 64];
  uint16_t k[Config::kStages][Config::kPanels][kTileRows * 64];
  uint16_t v[Config::kStages][Config::kPanels][kTileRows * 64];
  Mbarrier q_full, q_empty;
  Mbarrier k_full[Config::kStages], k_empty[Config::kStages];
  Mbarrier v_full[Config::kStages], v_empty[Config::kStages];
  Mbarrier tile_full[2], tile_empty[2];
  AttentionTile tile[2];  // list_count 0: there are no more
};

// A ring of stages: which one is next, and the parity of its round.
struct Ring {
  int stage = 0;
  int round = 0;

  template <int kStages>
  PBS_DEVICE void Advance() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

template <class Config>
class Sm90Producer {
 public:
  PBS_DEVICE Sm90Producer(const AttentionParams& params, const Sm90Operands& operands,
                          Sm90Shared<Config>& shared)
      : params_(params), operands_(operands), s_(shared) {}

  // By one thread.
  PBS_DEVICE void Run() {
    for (int count = 0;; ++count) {
      const int index = AtomicAdd(params_.next_tile, 1);
      const int slot = count & 1;
      MbarrierWait(&s_.tile_empty[slot], ((count >> 1) & 1) ^ 1);
      AttentionTile tile{};
      if (index < params_.num_tiles) tile = LoadGlobal(params_.tiles + index);
      StoreShared(&s_.tile[slot], tile);
      MbarrierArrive(&s_.tile_full[slot]);
      if (tile.list_count == 0) return;
      LoadQueries(tile, count);
      for (int step = 0; step < tile.list_count; ++step) LoadBlock(tile, step);
    }
  }

 private:
  PBS_DEVICE void LoadQueries(const AttentionTile& tile, int count) {
    MbarrierWait(&s_.q_empty, (count & 1) ^ 1);
    MbarrierArriveExpect(&s_.q_full, Config::kOperandBytes);
    const bool packed = operands_.q_packed != 0;
    const int first = tile.first_query + (packed ? tile.q_begin : 0);
    const int sequence = packed ? 0 : tile.sequence;
    for (int half = 0; half < 2; ++half) {
      for (int panel = 0; panel < Config::kPanels; ++panel) {
        CopyBox(s_.q[half][panel], operands_.q, &s_.q_full, panel * 64,
                first + half * 64, tile.head, sequence);
      }
    }
  }

  PBS_DEVICE void LoadBlock(const AttentionTile& tile, int step) {
    const bool packed = operands_.kv_packed != 0;
    const int row =
        ListBlock(params_, tile, step) * kTileRows + (packed ? tile.first_slot : 0);
    const int sequence = packed ? 0 : tile.sequence;
    const int stage = ring_.stage;
    MbarrierWait(&s_.k_empty[stage], ring_.round ^ 1);
    MbarrierArriveExpect(&s_.k_full[stage], Config::kOperandBytes);
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      CopyBox(s_.k[stage][panel], operands_.k, &s_.k_full[stage], panel * 64, row,
              tile.order_head, sequence);
    }
    MbarrierWait(&s_.v_empty[stage], ring_.round ^ 1);
    MbarrierArriveExpect(&s_.v_full[stage], Config::kOperandBytes);
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      CopyBox(s_.v[stage][panel], operands_.v, &s_.v_full[stage], panel * 64, row,
              tile.order_head, sequence);
    }
    ring_.template Advance<Config::kStages>();
  }

  const AttentionParams& params_;
  const Sm90Operands& operands_;
  Sm90Shared<Config>& s_;
  Ring ring_;
};

// 64 query rows: thread t of the warpgroup holds rows t / 32 * 16 + t % 32 / 4 and 8
// further down, of each row the columns that a product's fragment gives it.
template <class Config>
class Sm90Consumer {
 public:
  PBS_DEVICE Sm90Consumer(const AttentionParams& params, Sm90Shared<Config>& shared,
                          int half)
      : params_(params),
        s_(shared),
        half_(half),
        thread_(ThreadIndex() % 128),
        lane_(ThreadIndex() % 32) {}

  PBS_DEVICE void Run() {
    if (Config::kPingPong && half_ == 0) BarrierArrive(kTurnBarrier, 256);
    for (int count = 0;; ++count) {
      const int slot = count & 1;
      MbarrierWait(&s_.tile_full[slot], (count >> 1) & 1);
      tile_ = &s_.tile[slot];
      // Uniform in the warp, and known to be: otherwise every product is serialised.
      const int blocks = Shuffle(LoadShared(&tile_->list_count), 0);
      if (blocks == 0) return;
      Attend(count, blocks);
      BarrierSync(kOwnBarrier + half_, 128);
      if (thread_ == 0) MbarrierArrive(&s_.tile_empty[slot]);
    }
  }

 private:
  static constexpr int kTurnBarrier = 1;  // and 2: whose turn it is to issue
  static constexpr int kOwnBarrier = 4;   // and 5
  static constexpr int kSums = Config::kHeadDim / 2;  // registers of an output row pair
  // High words of the descriptors: 1024 bytes between groups of eight rows, 128-byte
  // swizzle. Low words: 16 bytes (unused) for K-major, a panel for MN-major.
  static constexpr uint32_t kDescriptorHigh = 1u << 30 | 1024 >> 4;
  static constexpr uint32_t kKMajor = 1u << 16;
  static constexpr uint32_t kMnMajor = uint32_t{kTileRows * 128 >> 4} << 16;

  PBS_DEVICE void Attend(int count, int blocks) {
    PBS_UNROLL
    for (int i = 0; i < kSums; ++i) out_[i] = 0;
    softmax_.Reset();
    const int masked = Shuffle(LoadShared(&tile_->num_masked), 0);
    block_ = ListBlock(params_, LoadShared(tile_), 0);
    if (masked > 0) FetchPositions(1);
    MbarrierWait(&s_.q_full, count & 1);
    First(masked > 0);
    int step = 1;
    PBS_NO_UNROLL
    for (; step < masked; ++step) Step<true>(step);
    PBS_NO_UNROLL
    for (; step < blocks; ++step) Step<false>(step);
    if (thread_ == 0) MbarrierArrive(&s_.q_empty);
    Last();
    StoreRows<typename Config::Element>(params_, LoadShared(tile_), Row(), lane_,
                                        softmax_, out_);
  }

  PBS_DEVICE void First(bool masked) {
    MbarrierWait(&s_.k_full[ring_.stage], ring_.round);
    PinRegisters(scores_);
    WgmmaFence();
    MultiplyKeys(ring_.stage);
    WgmmaCommit();
    WgmmaWait<0>();
    PinRegisters(scores_);
    if (thread_ == 0) MbarrierArrive(&s_.k_empty[ring_.stage]);
    if (masked) Mask();
    softmax_.Add<true>(params_.scale_log2, scores_);
    Round();
  }

  // Scores of this block while the values of the one before are added.
  template <bool kMasked>
  PBS_DEVICE void Step(int step) {
    const Ring before = ring_;
    ring_.template Advance<Config::kStages>();
    MbarrierWait(&s_.k_full[ring_.stage], ring_.round);
    if (Config::kPingPong) BarrierSync(kTurnBarrier + half_, 256);
    PinRegisters(scores_);
    PinRegisters(out_);
    WgmmaFence();
    MultiplyKeys(ring_.stage);
    WgmmaCommit();
    MbarrierWait(&s_.v_full[before.stage], before.round);
    PinRegisters(out_);
    WgmmaFence();
    MultiplyValues(before.stage);
    WgmmaCommit();
    if (Config::kPingPong) BarrierArrive(kTurnBarrier + 1 - half_, 256);
    if (kMasked) FetchPositions(step + 1);
    WgmmaWait<1>();
    PinRegisters(scores_);
    if (thread_ == 0) MbarrierArrive(&s_.k_empty[ring_.stage]);
    if (kMasked) Mask();
    softmax_.Add<kMasked>(params_.scale_log2, scores_);
    PinBeforeWait(softmax_.sum[0], softmax_.sum[1]);
    WgmmaWait<0>();
    PinRegisters(out_);
    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.stage]);
    Round();
    softmax_.Rescale(out_);
  }

  PBS_DEVICE void Last() {
    MbarrierWait(&s_.v_full[ring_.stage], ring_.round);
    PinRegisters(out_);
    WgmmaFence();
    MultiplyValues(ring_.stage);
    WgmmaCommit();
    WgmmaWait<0>();
    PinRegisters(out_);
    if (thread_ == 0) MbarrierArrive(&s_.v_empty[ring_.stage]);
    ring_.template Advance<Config::kStages>();
  }

  // scores = q k^T, sixteen columns of the head at a time.
  PBS_DEVICE void MultiplyKeys(int stage) {
    const uint32_t q = DescriptorStart(s_.q[half_]) | kKMajor;
    const uint32_t k = DescriptorStart(s_.k[stage]) | kKMajor;
    PBS_UNROLL
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const uint32_t column = i % 4 * (32 >> 4);
      WgmmaShared<typename Config::Element>(
          scores_, Descriptor(q + i / 4 * (64 * 128 >> 4) + column, kDescriptorHigh),
          Descriptor(k + i / 4 * (kTileRows * 128 >> 4) + column, kDescriptorHigh),
          i != 0);
    }
  }

  // out += p v, sixteen keys at a time.
  PBS_DEVICE void MultiplyValues(int stage) {
    const uint32_t v = DescriptorStart(s_.v[stage]) | kMnMajor;
    PBS_UNROLL
    for (int i = 0; i < kTileRows / 16; ++i) {
      const uint32_t a[4] = {p_[4 * i], p_[4 * i + 1], p_[4 * i + 2], p_[4 * i + 3]};
      WgmmaRegisters<typename Config::Element>(
          out_, a, Descriptor(v + i * (16 * 128 >> 4), kDescriptorHigh));
    }
  }

  // Positions of the masked block's keys, and which block the next step has: both are
  // under way while the scores are multiplied.
  PBS_DEVICE void FetchPositions(int next_step) {
    const AttentionTile tile = LoadShared(tile_);
    LoadPositions(params_, tile.order_head, tile.first_slot, block_ * kTileRows, lane_,
                  keys_);
    if (next_step < tile.num_masked) block_ = ListBlock(params_, tile, next_step);
  }

  PBS_DEVICE void Mask() {
    MaskRows(keys_, LoadShared(&tile_->first_position) + Row(), scores_);
  }

  PBS_DEVICE void Round() {
    PBS_UNROLL
    for (int i = 0; i < 32; ++i) {
      p_[i] = Config::Element::Pack(scores_[2 * i], scores_[2 * i + 1]);
    }
  }

  PBS_DEVICE int Row() const { return half_ * 64 + thread_ / 32 * 16 + lane_ / 4; }

  const AttentionParams& params_;
  Sm90Shared<Config>& s_;
  const int half_;
  const int thread_;  // of the warpgroup
  const int lane_;
  const AttentionTile* tile_ = nullptr;  // in shared memory
  Ring ring_;
  float scores_[64];
  float out_[kSums];
  uint32_t p_[32];
  Int2 keys_[kTileRows / 8];  // positions of a masked block's
  int block_;                 // the next one that is masked
  OnlineSoftmax softmax_;
};

template <class Config>
PBS_DEVICE void AttendSm90(const AttentionParams& params,
                           const Sm90Operands& operands) {
  auto& shared = *reinterpret_cast<Sm90Shared<Config>*>(SharedMemory());
  const int warpgroup = Shuffle(ThreadIndex() / 128, 0);
  if (ThreadIndex() == 0) {
    MbarrierInit(&shared.q_full, 1);
    MbarrierInit(&shared.q_empty, 2);
    for (int i = 0; i < Config::kStages; ++i) {
      MbarrierInit(&shared.k_full[i], 1);
      MbarrierInit(&shared.k_empty[i], 2);
      MbarrierInit(&shared.v_full[i], 1);
      MbarrierInit(&shared.v_empty[i], 2);
    }
    for (int i = 0; i < 2; ++i) {
      MbarrierInit(&shared.tile_full[i], 1);
      MbarrierInit(&shared.tile_empty[i], 2);
    }
    MbarrierInitFence();
  }
  SyncThreads();
  if (warpgroup == 0) {
    DecreaseRegisters<40>();
    if (ThreadIndex() == 0) Sm90Producer<Config>(params, operands, shared).Run();
  } else {
    IncreaseRegisters<232>();
    Sm90Consumer<Config>(params, shared, warpgroup - 1).Run();
  }
}

}  // namespace pbs::cuda
