// Attention problems for the emulator: inputs, permuted keys, lists, tiles, and the f64
// answer over the same lists.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/attention/attention_tile.h"
#include "pbs/dtype.h"
#include "tests/emulator/async.h"

namespace pbs::emulator {

struct AttentionSetting {
  int32_t head_dim = 128;
  int32_t heads = 2;
  int32_t kv_heads = 1;
  std::vector<std::pair<int32_t, int32_t>> sequences;  // q_len, k_len
  double density = 0.5;  // of the blocks of earlier segments
  bool arithmetic_lists = false;
  bool bf16 = true;
  bool map_rows = false;
  uint32_t seed = 1;
};

class AttentionCase {
 public:
  explicit AttentionCase(const AttentionSetting& setting)
      : setting_(setting), random_(setting.seed) {
    for (const auto& [q_len, k_len] : setting.sequences) {
      total_q_ += q_len;
      total_slots_ += (k_len + 127) / 128 * 128;
    }
    q_ = Normal(setting.heads, total_q_);
    k_ = Normal(setting.kv_heads, total_slots_);
    v_ = Normal(setting.kv_heads, total_slots_);
    positions_.assign(static_cast<size_t>(setting.kv_heads * total_slots_), INT32_MAX);
    o_.assign(static_cast<size_t>(setting.heads * total_q_ * setting.head_dim), 0);
    lse_.assign(static_cast<size_t>(setting.heads * total_q_), 0);
    row_map_.resize(static_cast<size_t>(total_q_));
    std::iota(row_map_.begin(), row_map_.end(), 0);
    if (setting.map_rows) std::shuffle(row_map_.begin(), row_map_.end(), random_);
    PlaceKeys();
    MakeTiles();
  }

  const std::vector<cuda::AttentionTile>& tiles() const { return tiles_; }
  TensorMap QMap() const { return Map(q_, setting_.heads, total_q_, 64); }
  TensorMap KMap() const { return Map(k_, setting_.kv_heads, total_slots_, 128); }
  TensorMap VMap() const { return Map(v_, setting_.kv_heads, total_slots_, 128); }

  // Pointers into this case; its memory becomes the kernel's global memory.
  cuda::AttentionParams Params() {
    next_tile_ = 0;
    GlobalMemory::Clear();
    Allow(tiles_, true);
    Allow(lists_, true);
    Allow(positions_, true);
    Allow(row_map_, true);
    Allow(o_, false);
    Allow(lse_, false);
    GlobalMemory::Allow(&next_tile_, 4, true);
    return {
        .tiles = tiles_.data(),
        .num_tiles = static_cast<int32_t>(tiles_.size()),
        .next_tile = &next_tile_,
        .lists = setting_.arithmetic_lists ? nullptr : lists_.data(),
        .positions = positions_.data(),
        .position_stride = total_slots_,
        .scale_log2 = 1.44269504f / std::sqrt(static_cast<float>(setting_.head_dim)),
        .o = o_.data(),
        .o_row_stride = setting_.head_dim,
        .o_head_stride = total_q_ * setting_.head_dim,
        .lse = lse_.data(),
        .lse_head_stride = total_q_,
        .row_map = setting_.map_rows ? row_map_.data() : nullptr};
  }

  struct Errors {
    double o = 0;
    double lse = 0;
  };
  // Largest differences from the f64 answer, over every row.
  Errors Compare() const {
    Errors errors;
    for (const cuda::AttentionTile& tile : tiles_) {
      for (int32_t row = tile.begin_row; row < tile.end_row; ++row) {
        CompareRow(tile, row, errors);
      }
    }
    return errors;
  }

 private:
  template <class T>
  static void Allow(const std::vector<T>& values, bool written) {
    GlobalMemory::Allow(values.data(), static_cast<int64_t>(values.size() * sizeof(T)),
                        written);
  }

  std::vector<uint16_t> Normal(int64_t heads, int64_t rows) {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(static_cast<size_t>(heads * rows * setting_.head_dim));
    for (uint16_t& value : values) {
      const float x = normal(random_);
      value = setting_.bf16 ? ToBf16(x).bits : ToF16(x).bits;
    }
    return values;
  }

  float Value(uint16_t bits) const {
    return setting_.bf16 ? ToFloat(bf16{bits}) : ToFloat(f16{bits});
  }

  TensorMap Map(const std::vector<uint16_t>& data, int64_t heads, int64_t rows,
                int32_t box_rows) const {
    return {data.data(),       setting_.head_dim,        rows,    heads,
            setting_.head_dim, rows * setting_.head_dim, box_rows};
  }

  // A random order inside whole segments of 256; the tail stays.
  void PlaceKeys() {
    for (int32_t head = 0; head < setting_.kv_heads; ++head) {
      int32_t* at = positions_.data() + head * total_slots_;
      for (const auto& [q_len, k_len] : setting_.sequences) {
        std::iota(at, at + k_len, 0);
        for (int32_t begin = 0; begin + 256 <= k_len && !setting_.arithmetic_lists;
             begin += 256) {
          std::shuffle(at + begin, at + begin + 256, random_);
        }
        at += (k_len + 127) / 128 * 128;
      }
    }
  }

  void MakeTiles() {
    int32_t first_row = 0;
    int32_t first_slot = 0;
    for (const auto& [q_len, k_len] : setting_.sequences) {
      const int32_t offset = k_len - q_len;
      const int32_t blocks = (k_len + 127) / 128;
      for (int32_t head = 0; head < setting_.heads && q_len > 0; ++head) {
        for (int32_t block = offset / 128; block < blocks; ++block) {
          const int32_t first = block * 128 - offset;  // row of the sequence
          cuda::AttentionTile tile{
              .list_begin = 0,
              .list_count = 0,
              .num_masked = 0,
              .head = head,
              .order_head = head / (setting_.heads / setting_.kv_heads),
              .first_query = first_row + first,
              .begin_row = std::max(0, -first),
              .end_row = std::min(128, q_len - first),
              .first_position = block * 128,
              .first_slot = first_slot};
          MakeList(block, blocks, tile);
          tiles_.push_back(tile);
        }
      }
      first_row += q_len;
      first_slot += blocks * 128;
    }
    std::stable_sort(tiles_.begin(), tiles_.end(), [](const auto& a, const auto& b) {
      return a.list_count > b.list_count;
    });
  }

  void MakeList(int32_t block, int32_t blocks, cuda::AttentionTile& tile) {
    if (setting_.arithmetic_lists) {
      tile.list_count = block + 1;
      tile.num_masked = 1;
      return;
    }
    tile.list_begin = static_cast<int64_t>(lists_.size());
    const int32_t own = block / 2 * 2;
    std::uniform_real_distribution<double> uniform;
    for (int32_t past = 0; past < own; ++past) {
      if (past == 0 || uniform(random_) < setting_.density) {
        lists_.push_back(static_cast<uint16_t>(past));
      }
    }
    for (int32_t i = own; i < std::min(own + 2, blocks); ++i) {
      lists_.push_back(static_cast<uint16_t>(i));
      ++tile.num_masked;
    }
    tile.list_count = static_cast<int32_t>(lists_.size() - tile.list_begin);
  }

  void CompareRow(const cuda::AttentionTile& tile, int32_t row, Errors& errors) const {
    const int32_t dim = setting_.head_dim;
    const int64_t query = tile.first_query + row;
    const uint16_t* q = q_.data() + (tile.head * total_q_ + query) * dim;
    std::vector<double> logits;
    std::vector<int64_t> slots;
    double top = -INFINITY;
    for (int32_t i = 0; i < tile.list_count; ++i) {
      const int32_t block = setting_.arithmetic_lists ? i : lists_[tile.list_begin + i];
      for (int32_t j = 0; j < 128; ++j) {
        const int64_t slot =
            tile.order_head * total_slots_ + tile.first_slot + block * 128 + j;
        if (positions_[slot] > tile.first_position + row) continue;
        double dot = 0;
        for (int32_t d = 0; d < dim; ++d)
          dot += double{Value(q[d])} * Value(k_[slot * dim + d]);
        logits.push_back(dot / std::sqrt(dim));
        slots.push_back(slot);
        top = std::max(top, logits.back());
      }
    }
    double sum = 0;
    std::vector<double> expected(static_cast<size_t>(dim));
    for (size_t i = 0; i < logits.size(); ++i) {
      const double weight = std::exp(logits[i] - top);
      sum += weight;
      for (int32_t d = 0; d < dim; ++d)
        expected[d] += weight * Value(v_[slots[i] * dim + d]);
    }
    const int64_t target = tile.head * total_q_ + row_map_[query];
    for (int32_t d = 0; d < dim; ++d) {
      errors.o =
          std::max(errors.o, std::abs(expected[d] / sum - Value(o_[target * dim + d])));
    }
    errors.lse = std::max(errors.lse, std::abs(top + std::log(sum) - lse_[target]));
  }

  const AttentionSetting setting_;
  std::mt19937 random_;
  int64_t total_q_ = 0;
  int64_t total_slots_ = 0;
  std::vector<uint16_t> q_, k_, v_, o_;
  std::vector<int32_t> positions_, row_map_;
  std::vector<float> lse_;
  std::vector<uint16_t> lists_;
  std::vector<cuda::AttentionTile> tiles_;
  int32_t next_tile_ = 0;
};

}  // namespace pbs::emulator
