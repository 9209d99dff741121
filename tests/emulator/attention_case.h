// Attention problems for the emulator: inputs, permuted keys, lists, tiles, and the f64
// result over the same lists.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/attention/attention_sm80.h"
#include "cuda/attention/attention_sm90.h"
#include "emulator/async.h"
#include "pbs/dtype.h"
#include "tests/support/largest_error.h"

namespace pbs::emulator {

struct AttentionSetting {
  int32_t head_dim = 128;
  int32_t heads = 2;
  int32_t kv_heads = 1;
  std::vector<std::pair<int32_t, int32_t>> sequences;  // q_len, k_len
  double density = 0.5;  // of the blocks of earlier segments
  // Every block is read, of keys in their own order: sequences lie back to back.
  bool arithmetic_lists = false;
  int32_t tile_rows = cuda::kTileRows;  // others with arithmetic lists only
  bool parts = false;  // of earlier blocks, which differ between groups of 64 rows
  bool bf16 = true;
  bool strided = false;      // operands and results [sequences, heads, longest, ...]
  bool nan_padding = false;  // keys and values behind the end of a strided sequence
  int32_t poisoned = -1;     // sequence of NaN and infinities, not looked at
  uint32_t seed = 1;
};

class AttentionCase {
 public:
  explicit AttentionCase(const AttentionSetting& setting)
      : setting_(setting), random_(setting.seed) {
    for (const auto& [q_len, k_len] : setting.sequences) {
      total_q_ += q_len;
      total_keys_ += Keys(k_len);
      longest_q_ = std::max<int64_t>(longest_q_, q_len);
      longest_keys_ = std::max<int64_t>(longest_keys_, Keys(k_len));
    }
    q_ = Normal(Strides(setting.heads, total_q_, longest_q_, setting.head_dim));
    k_ = Normal(KvStrides());
    v_ = Normal(KvStrides());
    if (setting.nan_padding) PutNanBehindEnds();
    if (setting.poisoned >= 0) Poison();
    positions_.assign(static_cast<size_t>(setting.kv_heads * total_keys_), INT32_MAX);
    o_.assign(q_.size(), 0);
    lse_.assign(q_.size() / static_cast<size_t>(setting.head_dim), 0);
    PlaceKeys();
    MakeTiles();
  }

  const std::vector<cuda::AttentionTile>& tiles() const { return tiles_; }
  // Pointers into this case.
  cuda::Sm90Operands OperandsSm90() const {
    const int32_t packed = setting_.strided ? 0 : 1;
    return {
        Map(q_, setting_.heads, QStrides(), Rows(total_q_, longest_q_), 64),
        Map(k_, setting_.kv_heads, KvStrides(), Rows(total_keys_, longest_keys_), 128),
        Map(v_, setting_.kv_heads, KvStrides(), Rows(total_keys_, longest_keys_), 128),
        Map(o_, setting_.heads, QStrides(), Rows(total_q_, longest_q_), 64),
        packed,
        packed};
  }
  cuda::Sm80Operands OperandsSm80() const {
    return {
        {q_.data(), QStrides()}, {k_.data(), KvStrides()}, {v_.data(), KvStrides()}};
  }

  // Pointers into this case; its memory becomes the kernel's global memory.
  cuda::AttentionParams Params() {
    next_tile_ = 0;
    GlobalMemory::Clear();
    Allow(tiles_, true);
    Allow(q_, true);
    Allow(k_, true);
    Allow(v_, true);
    Allow(lists_, true);
    Allow(positions_, true);
    Allow(parts_, true);
    Allow(column_bits_, true);
    Allow(o_, false);
    Allow(lse_, false);
    GlobalMemory::Allow(&next_tile_, 4, true);
    return {
        .tiles = tiles_.data(),
        .num_tiles = static_cast<int32_t>(tiles_.size()) - 1,
        .next_tile = &next_tile_,
        .lists = lists_.data(),
        .positions = setting_.arithmetic_lists ? nullptr : positions_.data(),
        .position_stride = total_keys_,
        .parts = setting_.parts ? parts_.data() : nullptr,
        .column_bits = column_bits_.data(),
        .column_stride = total_keys_ / 32,
        .scale_log2 = 1.44269504f / std::sqrt(static_cast<float>(setting_.head_dim)),
        .o = o_.data(),
        .o_strides = QStrides(),
        .lse = lse_.data(),
        .lse_strides = LseStrides()};
  }

  struct Errors {
    double o = 0;
    double lse = 0;
  };
  // Largest differences from the f64 result, over all rows.
  Errors Compare() const {
    Errors errors;
    for (const cuda::AttentionTile& tile : tiles_) {
      if (tile.sequence == setting_.poisoned) continue;
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

  // Keys that a sequence takes: whole blocks where they are permuted.
  int64_t Keys(int64_t k_len) const {
    return setting_.arithmetic_lists ? k_len : (k_len + 127) / 128 * 128;
  }

  int64_t Rows(int64_t total, int64_t longest) const {
    return setting_.strided ? longest : total;
  }
  cuda::RowStrides Strides(int64_t heads, int64_t total, int64_t longest,
                           int64_t width) const {
    const int64_t head = Rows(total, longest) * width;
    return {heads * head, head, width, setting_.strided ? 0 : 1};
  }
  cuda::RowStrides QStrides() const {
    return Strides(setting_.heads, total_q_, longest_q_, setting_.head_dim);
  }
  cuda::RowStrides KvStrides() const {
    return Strides(setting_.kv_heads, total_keys_, longest_keys_, setting_.head_dim);
  }
  cuda::RowStrides LseStrides() const {
    return Strides(setting_.heads, total_q_, longest_q_, 1);
  }

  std::vector<uint16_t> Normal(const cuda::RowStrides& strides) {
    const auto batch = setting_.strided ? setting_.sequences.size() : 1;
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(static_cast<size_t>(strides.sequence) * batch);
    for (uint16_t& value : values) {
      const float x = normal(random_);
      value = setting_.bf16 ? ToBf16(x).bits : ToF16(x).bits;
    }
    return values;
  }

  void PutNanBehindEnds() {
    const cuda::RowStrides strides = KvStrides();
    for (size_t n = 0; n < setting_.sequences.size(); ++n) {
      for (int32_t head = 0; head < setting_.kv_heads; ++head) {
        const int32_t k_len = setting_.sequences[n].second;
        for (int32_t row = k_len; row < longest_keys_; ++row) {
          const int64_t at = strides.Offset(static_cast<int32_t>(n), 0, head, row);
          std::fill_n(k_.begin() + at, setting_.head_dim, uint16_t{0x7FFF});
          std::fill_n(v_.begin() + at, setting_.head_dim, uint16_t{0x7FFF});
        }
      }
    }
  }

  // Poisons queries, keys and values of a sequence, which must not reach the result of
  // another.
  void Poison() {
    int64_t first_q = 0;
    int64_t first_key = 0;
    for (int32_t n = 0; n < setting_.poisoned; ++n) {
      first_q += setting_.sequences[n].first;
      first_key += Keys(setting_.sequences[n].second);
    }
    const auto [q_len, k_len] = setting_.sequences[setting_.poisoned];
    const auto poison = [&](std::vector<uint16_t>& data,
                            const cuda::RowStrides& strides, int32_t heads,
                            int64_t first, int64_t rows) {
      constexpr std::array<uint16_t, 3> kPoison = {0x7FFF, 0x7F80, 0xFF80};
      for (int32_t head = 0; head < heads; ++head) {
        for (int32_t row = 0; row < rows; ++row) {
          const int64_t at =
              strides.Offset(setting_.poisoned, static_cast<int32_t>(first), head, row);
          std::fill_n(data.begin() + at, setting_.head_dim, kPoison[row % 3]);
        }
      }
    };
    poison(q_, QStrides(), setting_.heads, first_q, q_len);
    poison(k_, KvStrides(), setting_.kv_heads, first_key, k_len);
    poison(v_, KvStrides(), setting_.kv_heads, first_key, k_len);
  }

  float Value(uint16_t bits) const {
    return setting_.bf16 ? ToFloat(bf16{bits}) : ToFloat(f16{bits});
  }

  TensorMap Map(const std::vector<uint16_t>& data, int64_t heads,
                const cuda::RowStrides& strides, int64_t rows, int32_t box_rows) const {
    return {.data = data.data(),
            .width = setting_.head_dim,
            .rows = rows,
            .heads = heads,
            .batch = static_cast<int64_t>(data.size()) / strides.sequence,
            .row_stride = strides.row,
            .head_stride = strides.head,
            .batch_stride = strides.sequence,
            .box_rows = box_rows};
  }

  // A random order inside whole segments of 256; the tail stays.
  void PlaceKeys() {
    for (int32_t head = 0; head < setting_.kv_heads; ++head) {
      int32_t* at = positions_.data() + head * total_keys_;
      for (const auto& [q_len, k_len] : setting_.sequences) {
        std::iota(at, at + k_len, 0);
        for (int32_t begin = 0; begin + 256 <= k_len && !setting_.arithmetic_lists;
             begin += 256) {
          std::shuffle(at + begin, at + begin + 256, random_);
        }
        at += Keys(k_len);
      }
    }
  }

  void MakeTiles() {
    int32_t q_begin = 0;
    int32_t first_slot = 0;
    for (size_t n = 0; n < setting_.sequences.size(); ++n) {
      const auto& [q_len, k_len] = setting_.sequences[n];
      for (int32_t head = 0; head < setting_.heads; ++head) {
        // Tiles with lists of their own lie on the grid of blocks.
        const bool on_grid = setting_.tile_rows == cuda::kTileRows;
        int32_t first = on_grid ? -((k_len - q_len) % 128) : 0;
        for (; first < q_len; first += setting_.tile_rows) {
          tiles_.push_back(MakeTile(static_cast<int32_t>(n), head, first));
          tiles_.back().q_begin = q_begin;
          tiles_.back().first_slot = first_slot;
        }
      }
      q_begin += q_len;
      first_slot += static_cast<int32_t>(Keys(k_len));
    }
    std::stable_sort(tiles_.begin(), tiles_.end(), [](const auto& a, const auto& b) {
      return a.list_count > b.list_count;
    });
    tiles_.push_back({});
  }

  // Its row 0 is row `first` of the sequence.
  cuda::AttentionTile MakeTile(int32_t sequence, int32_t head, int32_t first) {
    const auto& [q_len, k_len] = setting_.sequences[static_cast<size_t>(sequence)];
    const int32_t end_row = std::min(setting_.tile_rows, q_len - first);
    const int32_t first_position = k_len - q_len + first;
    const int32_t last_block = (first_position + end_row - 1) / 128;
    cuda::AttentionTile tile{.list_begin = -1,
                             .list_count = last_block + 1,
                             .num_masked = last_block + 1 - first_position / 128,
                             .last_block = last_block,
                             .sequence = sequence,
                             .head = head,
                             .order_head = head / (setting_.heads / setting_.kv_heads),
                             .q_begin = 0,  // the caller's
                             .first_query = first,
                             .begin_row = std::max(0, -first),
                             .end_row = end_row,
                             .first_position = first_position,
                             .first_slot = 0,  // the caller's
                             .num_keys = k_len};
    if (!setting_.arithmetic_lists) MakeList((k_len + 127) / 128, tile);
    return tile;
  }

  void MakeList(int32_t blocks, cuda::AttentionTile& tile) {
    const int32_t block = tile.last_block;
    tile.num_masked = 0;
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
    tile.last_block = lists_.back();
    if (!setting_.parts) return;
    MakeParts(tile);
    tile.num_masked = tile.list_count;
  }

  // Blocks of the own segment are read whole, so that every row sees its own key.
  void MakeParts(const cuda::AttentionTile& tile) {
    while (column_bits_.size() <
           setting_.heads * static_cast<size_t>(total_keys_) / 32) {
      column_bits_.push_back(random_() & random_());
    }
    const auto below = [&](int32_t end) {
      return static_cast<int32_t>(random_()) & (end - 1);
    };
    const int32_t own = tile.list_count - tile.num_masked;
    for (int32_t i = 0; i < cuda::kGroupsOfTile * tile.list_count; ++i) {
      uint32_t part = cuda::kWholePart;
      if (i < cuda::kGroupsOfTile * own) {
        part =
            cuda::WithSpan(cuda::PrefixPart(below(32)), 33 + below(8), 97 + below(8));
        part = cuda::WithSpan(part, 107 + below(16), 128);
        part = below(4) == 0 ? cuda::kNoPart : part;
        part |= below(2) == 0 ? cuda::kColumnsApart : 0;
      }
      parts_.push_back(part);
    }
  }

  // Row `row` of the tile reads key `slot` of the block at entry `i` of its list.
  bool Reads(const cuda::AttentionTile& tile, int32_t row, int32_t i,
             int32_t slot) const {
    if (!setting_.parts) return true;
    const uint32_t part = parts_[static_cast<size_t>(
        (tile.list_begin + i) * cuda::kGroupsOfTile + row / cuda::kRowGroup)];
    const int32_t column = tile.first_slot + slot;
    const uint32_t columns =
        column_bits_[static_cast<size_t>(tile.head * (total_keys_ / 32) + column / 32)];
    uint32_t word = cuda::PartWord(part, slot % 128 / 32);
    if ((part & cuda::kColumnsApart) != 0) word &= ~columns;
    return (word >> slot % 32 & 1) != 0;
  }

  void CompareRow(const cuda::AttentionTile& tile, int32_t row, Errors& errors) const {
    const int32_t dim = setting_.head_dim;
    const int32_t query = tile.first_query + row;
    const uint16_t* q =
        q_.data() + QStrides().Offset(tile.sequence, tile.q_begin, tile.head, query);
    const int32_t* positions =
        positions_.data() + tile.order_head * total_keys_ + tile.first_slot;
    std::vector<double> logits;
    std::vector<const uint16_t*> values;
    double top = -INFINITY;
    for (int32_t i = 0; i < tile.list_count; ++i) {
      const int32_t block = tile.list_begin < 0 ? i : lists_[tile.list_begin + i];
      const auto end = std::min<int64_t>(block * 128 + 128, Keys(tile.num_keys));
      for (int32_t slot = block * 128; slot < end; ++slot) {
        if (positions[slot] > tile.first_position + row) continue;
        if (!Reads(tile, row, i, slot)) continue;
        const int64_t at =
            KvStrides().Offset(tile.sequence, tile.first_slot, tile.order_head, slot);
        double dot = 0;
        for (int32_t d = 0; d < dim; ++d)
          dot += double{Value(q[d])} * Value(k_[at + d]);
        logits.push_back(dot / std::sqrt(dim));
        values.push_back(v_.data() + at);
        top = std::max(top, logits.back());
      }
    }
    double sum = 0;
    std::vector<double> expected(static_cast<size_t>(dim));
    for (size_t i = 0; i < logits.size(); ++i) {
      const double weight = std::exp(logits[i] - top);
      sum += weight;
      for (int32_t d = 0; d < dim; ++d) expected[d] += weight * Value(values[i][d]);
    }
    const uint16_t* o =
        o_.data() + QStrides().Offset(tile.sequence, tile.q_begin, tile.head, query);
    const float lse =
        lse_[LseStrides().Offset(tile.sequence, tile.q_begin, tile.head, query)];
    for (int32_t d = 0; d < dim; ++d) {
      errors.o = testing_support::LargerError(
          errors.o, std::abs(expected[d] / sum - Value(o[d])));
    }
    errors.lse =
        testing_support::LargerError(errors.lse, std::abs(top + std::log(sum) - lse));
  }

  const AttentionSetting setting_;
  std::mt19937 random_;
  int64_t total_q_ = 0;
  int64_t total_keys_ = 0;
  int64_t longest_q_ = 0;
  int64_t longest_keys_ = 0;
  std::vector<uint16_t> q_, k_, v_, o_;
  std::vector<int32_t> positions_;
  std::vector<float> lse_;
  std::vector<uint16_t> lists_;
  std::vector<uint32_t> parts_, column_bits_;
  std::vector<cuda::AttentionTile> tiles_;
  int32_t next_tile_ = 0;
};

}  // namespace pbs::emulator
