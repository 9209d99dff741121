// The producer thread of Hopper's attention, which requests all data that the consumers
// read (attention_sm90.h).
#pragma once

#include "cuda/attention/attention_rows.h"
#include "cuda/attention/sm90_config.h"
#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

// It reads each list from its end. It requests stages in the order in which they are
// multiplied: keys of block j + 1 before values of block j.
template <class Config>
class Sm90Producer {
 public:
  PBS_DEVICE Sm90Producer(const AttentionParams& params, const Sm90Operands& operands,
                          Sm90Shared<Config>& shared)
      : params_(params), operands_(operands), s_(shared) {}

  PBS_DEVICE void Run() {
    FetchTile(AtomicAdd(params_.next_tile, 1));
    for (int count = 0;; ++count) {
      NoteTile(count);
      MbarrierWait(&s_.tile_full[tiles_.slot], tiles_.round);
      tile_ = &s_.tile[tiles_.slot];
      tiles_.Advance();
      const int blocks = LoadShared(&tile_->list_count);
      if (blocks == 0) return;
      // The result arrives while blocks are requested.
      const int next = AtomicAdd(params_.next_tile, 1);
      LoadBlocks(blocks, next);
    }
  }

 private:
  static constexpr bool kHints = Config::kOptions.cache_hints;

  // Copies the record of tile `index` to the next slot. A record without blocks follows
  // the last one.
  PBS_DEVICE void FetchTile(int index) {
    const int slot = fetched_.slot;
    MbarrierArriveExpect(&s_.tile_full[slot], sizeof(AttentionTile));
    const int at = index < params_.num_tiles ? index : params_.num_tiles;
    CopyBytes(&s_.tile[slot], params_.tiles + at, sizeof(AttentionTile),
              &s_.tile_full[slot]);
    fetched_.Advance();
  }

  PBS_DEVICE void LoadBlocks(int blocks, int next) {
    constexpr bool kKeysFirst = Config::kOptions.keys_first;
    const int masked = LoadShared(&tile_->num_masked);
    const int64_t list = LoadShared(&tile_->list_begin);
    int before = 0;
    int block = LoadShared(&tile_->last_block);
    for (int step = 0; step < blocks; ++step) {
      // The list entry is read before the waits.
      const int left = blocks - 1 - step;
      const int after = left > 0 ? ListEntry(params_, list, left - 1) : 0;
      LoadKeys(block, step < masked);
      if (step == 0) LoadQueries();
      if (kKeysFirst && step > 0) LoadValues(before);
      if (!kKeysFirst || left == 0) LoadValues(block);
      if (step == 1 || blocks == 1) FetchTile(next);
      before = block;
      block = after;
    }
  }

  PBS_DEVICE void LoadQueries() {
    const bool packed = operands_.q_packed != 0;
    const int first =
        LoadShared(&tile_->first_query) + (packed ? LoadShared(&tile_->q_begin) : 0);
    const int sequence = packed ? 0 : LoadShared(&tile_->sequence);
    const int head = LoadShared(&tile_->head);
    const int buffer = queries_.slot;
    for (int i = 0; i < Config::kConsumers; ++i) {
      Mbarrier* full = &s_.q_full[buffer][i];
      MbarrierWait(&s_.q_empty[buffer][i], queries_.round ^ 1);
      MbarrierArriveExpect(full, Config::kQueryBytes);
      for (int panel = 0; panel < Config::kPanels; ++panel) {
        Copy(s_.q[buffer][i][panel], operands_.q, full, panel * 64, first + i * 64,
             head, sequence, [] { return EvictFirst(); });
      }
    }
    queries_.Advance();
  }

  // Loads keys; a masked block's keys with their positions.
  PBS_DEVICE void LoadKeys(int block, bool masked) {
    const int stage = keys_.slot;
    Mbarrier* full = &s_.k_full[stage];
    MbarrierWait(&s_.k_empty[stage], keys_.round ^ 1);
    if (masked && params_.positions != nullptr) {
      MbarrierArriveExpect(full, Config::kBlockBytes + kBlockKeys * 4);
      CopyBytes(s_.positions[stage],
                params_.positions +
                    LoadShared(&tile_->order_head) * params_.position_stride +
                    LoadShared(&tile_->first_slot) + block * kBlockKeys,
                kBlockKeys * 4, full);
    } else {
      MbarrierArriveExpect(full, Config::kBlockBytes);
    }
    LoadPanels(s_.k[stage], operands_.k, full, block);
    keys_.Advance();
  }

  PBS_DEVICE void LoadValues(int block) {
    const int stage = values_.slot;
    MbarrierWait(&s_.v_empty[stage], values_.round ^ 1);
    MbarrierArriveExpect(&s_.v_full[stage], Config::kBlockBytes);
    LoadPanels(s_.v[stage], operands_.v, &s_.v_full[stage], block);
    values_.Advance();
  }

  PBS_DEVICE void LoadPanels(uint16_t (&target)[Config::kPanels][kBlockKeys * 64],
                             const TensorMap& map, Mbarrier* full, int block) {
    const bool packed = operands_.kv_packed != 0;
    const int row = block * kBlockKeys + (packed ? LoadShared(&tile_->first_slot) : 0);
    const int sequence = packed ? 0 : LoadShared(&tile_->sequence);
    const int head = LoadShared(&tile_->order_head);
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      Copy(target[panel], map, full, panel * 64, row, head, sequence,
           [] { return EvictLast(); });
    }
  }

  template <class MakePolicy>
  PBS_DEVICE void Copy(uint16_t* target, const TensorMap& map, Mbarrier* full,
                       int column, int row, int head, int sequence,
                       MakePolicy&& policy) {
    if constexpr (kHints) {
      CopyBox(target, map, full, column, row, head, sequence, policy());
    } else {
      CopyBox(target, map, full, column, row, head, sequence);
    }
  }

  const AttentionParams& params_;
  const Sm90Operands& operands_;
  Sm90Shared<Config>& s_;
  const AttentionTile* tile_ = nullptr;  // in shared memory
  Ring<kTileSlots> fetched_, tiles_;
  Ring<Config::kQueryBuffers> queries_;
  Ring<Config::kStages> keys_, values_;
};

}  // namespace pbs::cuda
