// A consumer warpgroup of Hopper's attention, which multiplies (attention_sm90.h).
#pragma once

#include "cuda/attention/attention_rows.h"
#include "cuda/attention/sm90_config.h"
#include "cuda/primitives/primitives.h"
#include "cuda/tiles/online_softmax.h"

namespace pbs::cuda {

// It has 64 query rows. Thread t of the warpgroup holds row t / 32 * 16 + t % 32 / 4
// and the row 8 below it, and of each row the columns of a product's fragment.
template <class Config>
class Sm90Consumer {
 public:
  PBS_DEVICE Sm90Consumer(const AttentionParams& params, const Sm90Operands& operands,
                          Sm90Shared<Config>& shared, int index)
      : params_(params),
        operands_(operands),
        s_(shared),
        index_(index),
        thread_(ThreadIndex() % 128),
        lane_(ThreadIndex() % 32) {}

  PBS_DEVICE void Run() {
    if (kTakesTurns && index_ == 0) BarrierArrive(kTurnBarrier, 256);
    for (int count = 0;; ++count) {
      NoteTile(count);
      const int slot = tiles_.slot;
      MbarrierWait(&s_.tile_full[slot], tiles_.round);
      tile_ = &s_.tile[slot];
      // The shuffle shows the compiler that the value is uniform in the warp. Otherwise
      // every product is serialised.
      const int blocks = Shuffle(LoadShared(&tile_->list_count), 0);
      if (blocks == 0) break;
      Attend(blocks, count > 0);
      const bool leaves_whole = kOutputsInShared && HasAllRows();
      if (leaves_whole) {
        StageRows();
      } else {
        StoreRows<Element>(params_, LoadShared(tile_), Row(), lane_, softmax_, out_);
      }
      StoreLse(params_, LoadShared(tile_), Row(), lane_, softmax_);
      // All threads must have read the record before one thread releases it.
      BarrierSync(kOwnBarrier + index_, 128);
      if (leaves_whole && thread_ == 0) StoreStaged();
      tiles_.Advance();
      queries_.Advance();
    }
    // It runs also when nothing was stored: ptxas gives a warpgroup that ends right
    // after this loop no more registers than a thread has at launch.
    if (thread_ == 0) StoreWaitRead();
  }

 private:
  using Element = typename Config::Element;
  static constexpr bool kTakesTurns = Config::kOptions.takes_turns;
  static constexpr bool kOutputsInShared = Config::kQueryBuffers == 2;
  // The first of the barriers for the turns to issue products.
  static constexpr int kTurnBarrier = 1;
  static constexpr int kOwnBarrier = kTurnBarrier + Config::kConsumers;
  static constexpr int kSums = Config::kHeadDim / 2;  // registers of an output row pair
  // High words of the descriptors: 1024 bytes between groups of eight rows, 128-byte
  // swizzle. Low words: 16 bytes (unused) for K-major, a panel for MN-major.
  static constexpr uint32_t kDescriptorHigh = 1u << 30 | 1024 >> 4;
  static constexpr uint32_t kKMajor = 1u << 16;
  static constexpr uint32_t kMnMajor = uint32_t{kBlockKeys * 128 >> 4} << 16;

  PBS_DEVICE void Attend(int blocks, bool follows_another) {
    PBS_UNROLL
    for (int i = 0; i < kSums; ++i) out_[i] = 0;
    softmax_.Reset();
    const int masked = Shuffle(LoadShared(&tile_->num_masked), 0);
    MbarrierWait(&s_.q_full[queries_.slot][index_], queries_.round);
    First(masked > 0, follows_another);
    if (blocks == 1 && thread_ == 0) ReleaseQueries();
    int step = 1;
    PBS_NO_UNROLL
    for (; step < masked; ++step) Step<true>(step, step + 1 == blocks);
    PBS_NO_UNROLL
    for (; step < blocks; ++step) Step<false>(step, step + 1 == blocks);
    Last();
  }

  PBS_DEVICE void First(bool masked, bool follows_another) {
    if (masked) RequestPart(0);
    MbarrierWait(&s_.k_full[blocks_.slot], blocks_.round);
    PinRegisters(scores_);
    WgmmaFence();
    MultiplyKeys(blocks_.slot);
    WgmmaCommit();
    if (kOutputsInShared && follows_another) ReleaseStaged();
    if (masked) FetchPositions();
    WgmmaWait<0>();
    PinRegisters(scores_);
    if (masked) Mask(0);
    if (thread_ == 0) MbarrierArrive(&s_.k_empty[blocks_.slot]);
    softmax_.template Add<true>(params_.scale_log2, scores_);
    Round();
    ClearForeignValues();
  }

  // Computes the scores of this block while the values of the block before are added.
  template <bool kMasked>
  PBS_DEVICE void Step(int step, bool is_last) {
    if (kMasked) RequestPart(step);
    const auto before = blocks_;
    blocks_.Advance();
    MbarrierWait(&s_.k_full[blocks_.slot], blocks_.round);
    if (kTakesTurns) BarrierSync(kTurnBarrier + index_, 256);
    PinRegisters(scores_);
    PinRegisters(out_);
    WgmmaFence();
    MultiplyKeys(blocks_.slot);
    WgmmaCommit();
    MbarrierWait(&s_.v_full[before.slot], before.round);
    PinRegisters(out_);
    WgmmaFence();
    MultiplyValues(before.slot);
    WgmmaCommit();
    if (kTakesTurns) BarrierArrive(kTurnBarrier + NextConsumer(), 256);
    if (kMasked) FetchPositions();
    WgmmaWait<1>();
    PinRegisters(scores_);
    if (kMasked) Mask(step);
    if (thread_ == 0) {
      MbarrierArrive(&s_.k_empty[blocks_.slot]);
      if (is_last) ReleaseQueries();
    }
    softmax_.template Add<kMasked>(params_.scale_log2, scores_);
    PinBeforeWait(softmax_.sum[0], softmax_.sum[1]);
    WgmmaWait<0>();
    PinRegisters(out_);
    if (thread_ == 0) MbarrierArrive(&s_.v_empty[before.slot]);
    Round();
    softmax_.Rescale(out_);
  }

  PBS_DEVICE void Last() {
    MbarrierWait(&s_.v_full[blocks_.slot], blocks_.round);
    PinRegisters(out_);
    WgmmaFence();
    MultiplyValues(blocks_.slot);
    WgmmaCommit();
    WgmmaWait<0>();
    PinRegisters(out_);
    if (thread_ == 0) MbarrierArrive(&s_.v_empty[blocks_.slot]);
    blocks_.Advance();
  }

  // scores = q k^T, sixteen columns of the head at a time.
  PBS_DEVICE void MultiplyKeys(int stage) {
    const uint32_t q = DescriptorStart(s_.q[queries_.slot][index_]) | kKMajor;
    const uint32_t k = DescriptorStart(s_.k[stage]) | kKMajor;
    PBS_UNROLL
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const uint32_t column = i % 4 * (32 >> 4);
      WgmmaShared<Element>(
          scores_, Descriptor(q + i / 4 * (64 * 128 >> 4) + column, kDescriptorHigh),
          Descriptor(k + i / 4 * (kBlockKeys * 128 >> 4) + column, kDescriptorHigh),
          i != 0);
    }
  }

  // out += p v, sixteen keys at a time.
  PBS_DEVICE void MultiplyValues(int stage) {
    const uint32_t v = DescriptorStart(s_.v[stage]) | kMnMajor;
    PBS_UNROLL
    for (int i = 0; i < kBlockKeys / 16; ++i) {
      const uint32_t a[4] = {p_[4 * i], p_[4 * i + 1], p_[4 * i + 2], p_[4 * i + 3]};
      WgmmaRegisters<Element>(out_, a,
                              Descriptor(v + i * (16 * 128 >> 4), kDescriptorHigh));
    }
  }

  static constexpr bool kPermutes = Config::kOptions.rows == kTileRows;

  PBS_DEVICE bool ReadsParts() const {
    return kPermutes && params_.parts != nullptr && LoadShared(&tile_->list_begin) >= 0;
  }

  // Requests the part of a step's block, and the index of the next step's, so that no
  // load waits for another. The part arrives during the score product.
  PBS_DEVICE void RequestPart(int step) {
    if (!ReadsParts()) return;
    const int block = step == 0 ? LoadShared(&tile_->last_block) : next_block_;
    const int left = LoadShared(&tile_->list_count) - 1 - step;
    const int64_t entry = LoadShared(&tile_->list_begin) + left;
    part_ = LoadPart(params_, entry, index_, LoadShared(&tile_->head),
                     LoadShared(&tile_->first_slot), block, lane_ % 4);
    if (left > 0) next_block_ = LoadGlobal(params_.lists + entry - 1);
  }

  // Reads the positions of a masked block's permuted keys, which were loaded with
  // the keys.
  PBS_DEVICE void FetchPositions() {
    if (!kPermutes || params_.positions == nullptr) return;
    PBS_UNROLL
    for (int i = 0; i < kBlockKeys / 8; ++i) {
      keys_[i] = LoadShared(&s_.positions[blocks_.slot][i * 4 + lane_ % 4]);
    }
    if (!ReadsParts()) return;
    uint32_t bits[kBlockKeys / 32];
    const uint32_t own = part_.Bits(lane_ % 4);
    PBS_UNROLL
    for (int i = 0; i < kBlockKeys / 32; ++i) bits[i] = Shuffle(own, i);
    HideUnread(bits, lane_, keys_);
  }

  PBS_DEVICE void Mask(int step) {
    const int position = LoadShared(&tile_->first_position) + Row();
    if (kPermutes && params_.positions != nullptr) {
      MaskRows(keys_, position, scores_);
      // All threads have read their positions when one thread releases the stage.
      BarrierSync(kOwnBarrier + index_, 128);
    } else {
      const int first = (LoadShared(&tile_->last_block) - step) * kBlockKeys;
      MaskBehind(position - first - lane_ % 4 * 2, scores_);
    }
  }

  PBS_DEVICE void Round() {
    PBS_UNROLL
    for (int i = 0; i < 32; ++i) {
      p_[i] = Element::Pack(scores_[2 * i], scores_[2 * i + 1]);
    }
  }

  // Where keys are read in the caller's memory, the last block of a sequence may hold
  // values of another sequence. They have weight 0, but 0 * NaN is NaN, so they are set
  // to 0.
  PBS_DEVICE void ClearForeignValues() {
    if (params_.positions != nullptr) return;
    const int own =
        LoadShared(&tile_->num_keys) - LoadShared(&tile_->last_block) * kBlockKeys;
    if (own >= kBlockKeys) return;
    MbarrierWait(&s_.v_full[blocks_.slot], blocks_.round);
    // A row of a panel is eight words of 16 bytes, in an order that the swizzle
    // decides.
    constexpr int kRowWords = 8;
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      auto* words = reinterpret_cast<Words4*>(s_.v[blocks_.slot][panel]);
      for (int i = own * kRowWords + thread_; i < kBlockKeys * kRowWords; i += 128) {
        StoreShared(words + i, Words4{});
      }
    }
    ProxyFence();
    BarrierSync(kOwnBarrier + index_, 128);
  }

  // True when all rows of the warpgroup belong to the sequence.
  PBS_DEVICE bool HasAllRows() const {
    return LoadShared(&tile_->begin_row) <= index_ * 64 &&
           LoadShared(&tile_->end_row) >= index_ * 64 + 64;
  }

  // Writes outputs to the memory of the queries, as boxes of 64 rows and columns.
  PBS_DEVICE void StageRows() {
    BarrierSync(kOwnBarrier + index_, 128);  // no thread reads the queries any more
    float inverse[2];
    for (int r = 0; r < 2; ++r) inverse[r] = Inverse(softmax_.RowSum(r));
    // The row whose address the lane gives.
    const int row = thread_ / 32 * 16 + lane_ % 16;
    PBS_UNROLL
    for (int i = 0; i < kSums / 4; i += 2) {  // eight columns each
      uint32_t words[4];
      PBS_UNROLL
      for (int j = 0; j < 4; ++j) {  // two rows of eight, of two columns of eight
        const int first = (i + j / 2) * 4 + j % 2 * 2;
        words[j] = Element::Pack(out_[first] * inverse[j % 2],
                                 out_[first + 1] * inverse[j % 2]);
      }
      const int piece = (i % 8 + lane_ / 16) ^ (row % 8);
      StoreMatrices(
          SharedAddress(s_.q[queries_.slot][index_][i / 8]) + row * 128 + piece * 16,
          words);
    }
    ProxyFence();
  }

  // By one thread.
  PBS_DEVICE void StoreStaged() {
    const AttentionTile tile = LoadShared(tile_);
    const bool packed = params_.o_strides.packed != 0;
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      StoreBox(operands_.o, s_.q[queries_.slot][index_][panel], panel * 64,
               tile.first_query + (packed ? tile.q_begin : 0) + index_ * 64, tile.head,
               packed ? 0 : tile.sequence);
    }
    StoreCommit();
  }

  // Releases the queries' memory, after stores from it have read it.
  PBS_DEVICE void ReleaseQueries() {
    if (!kOutputsInShared) MbarrierArrive(&s_.q_empty[queries_.slot][index_]);
  }
  PBS_DEVICE void ReleaseStaged() {
    if (thread_ != 0) return;
    StoreWaitRead();
    MbarrierArrive(&s_.q_empty[queries_.slot ^ 1][index_]);
  }

  PBS_DEVICE int NextConsumer() const {
    return index_ + 1 == Config::kConsumers ? 0 : index_ + 1;
  }
  PBS_DEVICE int Row() const { return index_ * 64 + thread_ / 32 * 16 + lane_ / 4; }

  const AttentionParams& params_;
  const Sm90Operands& operands_;
  Sm90Shared<Config>& s_;
  const int index_;   // index among the consumers
  const int thread_;  // index in the warpgroup
  const int lane_;
  const AttentionTile* tile_ = nullptr;  // in shared memory
  Ring<kTileSlots> tiles_;
  Ring<Config::kQueryBuffers> queries_;
  Ring<Config::kStages> blocks_;  // keys, and values one step later
  float scores_[64];
  float out_[kSums];
  uint32_t p_[32];
  Int2 keys_[kBlockKeys / 8];  // positions of a masked block's
  PartOfBlock part_{};         // of the masked block
  int next_block_ = 0;
  OnlineSoftmax softmax_;
};

}  // namespace pbs::cuda
