// Tests the order of attention's tiles alone: random lists, the kernel's tiles and the
// expected ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/plan/pipeline.h"
#include "emulator/device_array.h"
#include "pbs/block_lists.h"

namespace pbs::emulator {

class TileOrderCase {
 public:
  // `density` is the density of the blocks of earlier segments. Lists are like those of
  // a selection or, with use_given_lists, like a caller's, which may lack blocks of the
  // own segment.
  TileOrderCase(const AttentionProblem& problem, double density, uint32_t seed,
                bool wide_tiles = false)
      : random_(seed),
        plan_(*cuda::MakeCudaPlan(
            problem, {.num_multiprocessors = 1, .wide_tiles = wide_tiles})),
        g_(plan_->geometry),
        workspace_(plan_->workspace_bytes) {
    GlobalMemory::Clear();
    workspace_.Allow();
    MakeLists(density);
    if (plan_->selects) Put(plan_->counts_at, lists_.count);
    for (const auto& [at, bytes] :
         {std::pair<const void*, size_t>{lists_.begin.data(), 8 * lists_.begin.size()},
          {lists_.count.data(), 2 * lists_.count.size()},
          {lists_.indices.data(), 2 * lists_.indices.size()}})
      GlobalMemory::Allow(at, static_cast<int64_t>(bytes), /*written=*/true);
  }

  // Returns "" or the defect.
  std::string Run(uint32_t seed) {
    AttentionTensors tensors;
    tensors.q = tensors.k =
        tensors.v = {workspace_.data(), PackedLayout(g_.total_k, g_.head_dim)};
    tensors.o = {workspace_.data(), tensors.q.layout};  // none of them is touched
    tensors.lists = lists_.View();
    const auto params =
        cuda::MakeRunParams(*plan_, tensors, {workspace_.data(), workspace_.bytes()});
    if (!params.ok()) return params.status().ToString();
    EmulatorLauncher launch;
    launch.seed = seed;
    cuda::EnqueueStoreSequences(*plan_, *params, launch);
    cuda::EnqueueOrderTiles(params->tile_order, launch);
    if (!launch.fault.ok()) return launch.fault.ToString();
    if (*At<int32_t>(plan_->next_tile_at) != 0) return "tiles are not counted from 0";
    if (At<Tile>(plan_->tiles_at)[plan_->num_tiles()].list_count != 0) {
      return "behind the last tile is another one";
    }
    const auto& summary = *At<cuda::RunSummary>(plan_->summary_at);
    if (!(summary.listed > summary.began)) return "the end has no time";
    const std::string wrong = CompareSections();
    return wrong.empty() ? CompareCounts() : wrong;
  }

 private:
  using Tile = cuda::AttentionTile;

  template <class T>
  const T* At(int64_t offset) const {
    return reinterpret_cast<const T*>(workspace_.data() + offset);
  }
  template <class T>
  void Put(int64_t offset, const std::vector<T>& values) {
    const size_t bytes = values.size() * sizeof(T);
    std::memcpy(workspace_.data() + offset, values.data(), bytes);
    GlobalMemory::MarkWritten(workspace_.data() + offset, static_cast<int64_t>(bytes));
  }

  void MakeLists(double density) {
    std::bernoulli_distribution is_read(density);
    const bool given = plan_->problem.options.use_given_lists;
    for (const SequenceGeometry& s : g_.sequences) {
      for (int32_t head = 0; head < g_.num_heads; ++head) {
        for (int32_t i = 0; i < s.num_query_blocks; ++i) {
          const int32_t block = s.first_query_block + i;
          const int32_t own = block / g_.blocks_per_segment * g_.blocks_per_segment;
          lists_.begin.push_back(static_cast<int64_t>(lists_.indices.size()));
          for (int32_t j = 0; j < g_.RowCapacity(s, block); ++j) {
            const bool is_own = j >= own && (!given || j == block);
            if (is_own || is_read(random_)) {
              lists_.indices.push_back(static_cast<uint16_t>(j));
            }
          }
          lists_.count.push_back(
              static_cast<uint16_t>(lists_.indices.size() - lists_.begin.back()));
        }
      }
    }
  }

  bool HasLists(int32_t sequence) const {
    return plan_->has_lists && plan_->sequences[sequence].sparse != 0;
  }
  bool FallsBack(int32_t sequence, int32_t order_head) const {
    if (!plan_->problem.options.dense_fallback || !plan_->selects ||
        !HasLists(sequence)) {
      return false;
    }
    const SequenceGeometry& s = g_.sequences[sequence];
    const int32_t members = g_.num_heads / g_.num_order_heads;
    double executed = 0;
    double causal = 0;
    for (int32_t head = order_head * members; head < (order_head + 1) * members;
         ++head) {
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        executed += lists_.count[g_.ListRow(sequence, head, i)];
        causal += s.first_query_block + i + 1;
      }
    }
    return executed >= static_cast<double>(0.95f) * causal;
  }

  int32_t NumTiles(const SequenceGeometry& s) const {
    return IsWide() ? (s.q_len + plan_->tile_rows - 1) / plan_->tile_rows
                    : s.num_query_blocks;
  }
  bool IsWide() const { return plan_->tile_rows != cuda::kTileRows; }

  // The expected tile where every block is read: rows of the sequence from `first` on.
  Tile ExpectedWide(int32_t sequence, int32_t head, int32_t first) const {
    const SequenceGeometry& s = g_.sequences[sequence];
    Tile tile{};
    tile.list_begin = -1;
    tile.sequence = sequence;
    tile.head = head;
    tile.order_head = g_.KvHead(head);
    tile.q_begin = static_cast<int32_t>(s.q_begin);
    tile.first_query = first;
    tile.end_row = std::min(s.q_len - first, plan_->tile_rows);
    tile.first_position = s.query_offset + first;
    tile.last_block = (tile.first_position + tile.end_row - 1) / g_.block_size;
    tile.list_count = tile.last_block + 1;
    tile.num_masked = tile.list_count - tile.first_position / g_.block_size;
    tile.first_slot = static_cast<int32_t>(s.k_begin);
    tile.num_keys = s.k_len;
    return tile;
  }

  Tile Expected(int32_t sequence, int32_t head, int32_t index) const {
    if (IsWide()) return ExpectedWide(sequence, head, index * plan_->tile_rows);
    const SequenceGeometry& s = g_.sequences[sequence];
    const int32_t query_block = index;
    const int32_t block = s.first_query_block + query_block;
    const int32_t own = block / g_.blocks_per_segment * g_.blocks_per_segment;
    const int32_t end = g_.RowCapacity(s, block);
    const int64_t row = g_.ListRow(sequence, head, query_block);
    Tile tile{};
    tile.list_begin = -1;
    tile.list_count = block + 1;
    tile.num_masked = 1;
    tile.last_block = block;
    if (HasLists(sequence) && FallsBack(sequence, g_.OrderHead(head))) {
      tile.list_count = end;
      tile.num_masked = end - own;
      tile.last_block = end - 1;
    } else if (HasLists(sequence)) {
      tile.list_begin = s.entries_begin + head * s.entries_per_head;
      for (int32_t i = 0; i < query_block; ++i) {
        tile.list_begin += g_.RowCapacity(s, s.first_query_block + i);
      }
      const auto list = lists_.View().Row(row);
      tile.list_count = static_cast<int32_t>(list.size());
      tile.num_masked = static_cast<int32_t>(std::count_if(
          list.begin(), list.end(), [own](uint16_t j) { return j >= own; }));
      tile.last_block = list.back();
    }
    tile.sequence = sequence;
    tile.head = head;
    tile.order_head = plan_->permutes ? g_.OrderHead(head) : g_.KvHead(head);
    tile.q_begin = static_cast<int32_t>(s.q_begin);
    tile.first_query = block * g_.block_size - s.query_offset;
    tile.begin_row = std::max(-tile.first_query, 0);
    tile.end_row = std::min(s.q_len - tile.first_query, g_.block_size);
    tile.first_position = block * g_.block_size;
    tile.first_slot = static_cast<int32_t>(plan_->permutes ? s.slot_begin : s.k_begin);
    tile.num_keys = s.k_len;
    return tile;
  }

  std::string CompareSections() const {
    int64_t begin = 0;  // of the section
    std::vector<Tile> expected;
    const auto num_sequences = static_cast<int32_t>(g_.sequences.size());
    for (int32_t n = 0; n < num_sequences; ++n) {
      for (int32_t head = 0; head < g_.num_heads; ++head) {
        for (int32_t i = 0; i < NumTiles(g_.sequences[n]); ++i) {
          expected.push_back(Expected(n, head, i));
        }
        const bool last_of_order =
            head + 1 == g_.num_heads || g_.OrderHead(head + 1) != g_.OrderHead(head);
        const bool last_of_all = n + 1 == num_sequences && head + 1 == g_.num_heads;
        if (plan_->one_section ? !last_of_all : !last_of_order) continue;
        const std::string wrong = CompareSection(begin, expected);
        if (!wrong.empty()) {
          return "sequence " + std::to_string(n) + ", head " + std::to_string(head) +
                 ": " + wrong;
        }
        begin += static_cast<int64_t>(expected.size());
        expected.clear();
      }
    }
    return "";
  }

  static auto Fields(const Tile& t) {
    return std::tie(t.list_begin, t.list_count, t.num_masked, t.last_block, t.sequence,
                    t.head, t.order_head, t.q_begin, t.first_query, t.begin_row,
                    t.end_row, t.first_position, t.first_slot, t.num_keys);
  }

  // `expected`: by sequence, head and query block.
  std::string CompareSection(int64_t begin, const std::vector<Tile>& expected) const {
    const auto* tiles = At<Tile>(plan_->tiles_at) + begin;
    std::vector<Tile> actual(tiles, tiles + expected.size());
    for (size_t i = 1; i < actual.size(); ++i) {
      if (actual[i].list_count > actual[i - 1].list_count) {
        return "a longer list comes behind a shorter one";
      }
    }
    const auto by_place = [](const Tile& a, const Tile& b) {
      return std::tie(a.sequence, a.head, a.first_position) <
             std::tie(b.sequence, b.head, b.first_position);
    };
    std::sort(actual.begin(), actual.end(), by_place);
    for (size_t i = 0; i < actual.size(); ++i) {
      if (Fields(actual[i]) == Fields(expected[i])) continue;
      return "a tile of " + std::to_string(actual[i].list_count) + " blocks, " +
             std::to_string(actual[i].num_masked) + " of them masked, is not the one " +
             "of " + std::to_string(expected[i].list_count) + " blocks, " +
             std::to_string(expected[i].num_masked) + " of them masked";
    }
    return CompareGiven();
  }

  std::string CompareCounts() const {
    if (!plan_->has_lists) return "";
    const auto* counts = At<BlockCounts>(plan_->head_blocks_at);
    for (int32_t head = 0; head < g_.num_heads; ++head) {
      BlockCounts expected;
      for (int32_t n = 0; n < static_cast<int32_t>(g_.sequences.size()); ++n) {
        for (int32_t i = 0; i < g_.sequences[n].num_query_blocks; ++i) {
          const Tile tile = Expected(n, head, i);
          const int32_t block = g_.sequences[n].first_query_block + i;
          const auto list = lists_.View().Row(g_.ListRow(n, head, i));
          expected.executed += tile.list_count;
          expected.lower +=
              tile.list_begin < 0
                  ? std::min(tile.list_count, block + 1)
                  : std::upper_bound(list.begin(), list.end(), block) - list.begin();
        }
      }
      if (counts[head].executed == expected.executed &&
          counts[head].lower == expected.lower) {
        continue;
      }
      return "head " + std::to_string(head) + " reads " +
             std::to_string(counts[head].executed) + " blocks, " +
             std::to_string(counts[head].lower) + " of them below, not " +
             std::to_string(expected.executed) + " and " +
             std::to_string(expected.lower);
    }
    return "";
  }

  // The caller's lists must be copied to the place of a selection's lists.
  std::string CompareGiven() const {
    if (!plan_->problem.options.use_given_lists) return "";
    for (int32_t n = 0; n < static_cast<int32_t>(g_.sequences.size()); ++n) {
      if (!HasLists(n)) continue;
      for (int32_t head = 0; head < g_.num_heads; ++head) {
        for (int32_t i = 0; i < g_.sequences[n].num_query_blocks; ++i) {
          const auto list = lists_.View().Row(g_.ListRow(n, head, i));
          const auto* copy =
              At<uint16_t>(plan_->entries_at) + Expected(n, head, i).list_begin;
          if (!std::equal(list.begin(), list.end(), copy)) return "a list changed";
        }
      }
    }
    return "";
  }

  std::mt19937 random_;
  std::unique_ptr<cuda::CudaAttentionPlan> plan_;
  const AttentionGeometry& g_;
  DeviceArray<std::byte> workspace_;
  BlockLists lists_;
};

// Problems that reach what differs: bins of several warps and several to a thread,
// sections of one head and of all, lists that pay, do not and are the caller's.
struct TileOrderSetting {
  const char* name;
  AttentionProblem problem;
  double density;
  bool wide_tiles = false;
};
inline std::vector<TileOrderSetting> TileOrderSettings() {
  const std::vector<SequenceShape> batch = {
      {130, 700}, {200, 200}, {0, 300}, {1, 600}, {1500, 5000}};
  return {
      {"long", {{1, 1, 64, {{70000, 70000}}}, DType::kBF16, {}}, 0.5},
      {"batch", {{4, 2, 64, batch}, DType::kBF16, {}}, 0.4},
      {"sections_that_pay",
       {{4, 2, 64, batch}, DType::kBF16, {.dense_fallback = true}},
       0.4},
      {"sections_that_do_not",
       {{4, 2, 64, batch}, DType::kBF16, {.dense_fallback = true}},
       1},
      {"query_heads",
       {{4, 2, 64, batch},
        DType::kBF16,
        {.scope = Scope::kQueryHead, .dense_fallback = true}},
       0.96},
      {"pooled",
       {{4, 2, 64, batch}, DType::kBF16, {.method = Method::kMeanPooling}},
       0.4},
      {"dense", {{4, 2, 64, batch}, DType::kBF16, {.method = Method::kDense}}, 1},
      {"wide", {{4, 2, 64, batch}, DType::kBF16, {.method = Method::kDense}}, 1, true},
      {"wide_sections",
       {{4, 2, 64, {{150000, 150000}, {300, 700}}},
        DType::kBF16,
        {.method = Method::kDense}},
       1,
       true},
      {"given",
       {{4, 2, 64, batch},
        DType::kBF16,
        {.segment_size = 384, .use_given_lists = true}},
       0.4},
  };
}

}  // namespace pbs::emulator
