// Spec: cuda/selection, what single kernels leave behind: the means of blocks, bit by
// bit, the order of attention's tiles, and nothing of a neighbour's bad rows.
#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "cuda/plan/cuda_report.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/emulator/tile_order_case.h"

namespace pbs::emulator {
namespace {

// The mean of up to 128 rows in the order in which kernels sum them; element(row) is 0
// where there is no row.
template <class ElementOf>
float Mean(int32_t head_dim, ElementOf&& element) {
  const int partial_sums = cuda::PartialSums(head_dim);
  float sum = 0;
  for (int first = 0; first < partial_sums; ++first) {
    float partial = 0;
    for (int row = first; row < 128; row += partial_sums) partial += element(row);
    sum += partial;
  }
  return sum / 128;
}

template <class T>
const T* At(const std::byte* workspace, int64_t offset) {
  return reinterpret_cast<const T*>(workspace + offset);
}

template <int kHeadDim>
void CheckMeans(const AttentionProblem& problem) {
  SCOPED_TRACE(testing::Message() << "head dim " << kHeadDim);
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  PipelineInputs inputs(problem, 5);
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<cuda::Bf16Element, kHeadDim> run(**plan, inputs.Tensors(), 1);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  const AttentionGeometry& g = (*plan)->geometry;
  const auto value = [&](const DeviceArray<uint16_t>& array, int64_t row, int32_t d) {
    return ToFloat(bf16{array.data()[row * kHeadDim + d]});
  };
  const auto* key_means = At<float>(run.workspace(), (*plan)->pooled_keys_at);
  const auto* query_means = At<float>(run.workspace(), (*plan)->pooled_queries_at);
  const auto* positions = At<int32_t>(run.workspace(), (*plan)->positions_at);
  for (const SequenceGeometry& s : g.sequences) {
    const int64_t first_block = s.slot_begin / 128;
    for (int32_t d = 0; d < kHeadDim; ++d) {
      for (int32_t block = 0; block < s.num_key_blocks; ++block) {
        const float expected = Mean(kHeadDim, [&](int row) {
          const int64_t slot = block * 128 + row;
          if (slot >= s.k_len) return 0.0f;
          const int64_t position =
              (*plan)->permutes ? positions[s.slot_begin + slot] : slot;
          return value(inputs.k, s.k_begin + position, d);
        });
        ASSERT_EQ(key_means[d * (*plan)->total_key_blocks + first_block + block],
                  expected)
            << "key block " << block << ", column " << d;
      }
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        const float expected = Mean(kHeadDim, [&](int row) {
          const int32_t query = (s.first_query_block + i) * 128 + row - s.query_offset;
          if (query < 0 || query >= s.q_len) return 0.0f;
          return value(inputs.q, s.q_begin + query, d);
        });
        const int64_t at = (s.query_block_begin + i) * g.num_heads * kHeadDim + d;
        ASSERT_EQ(query_means[at], expected) << "query block " << i << ", column " << d;
      }
    }
  }
}

// However many rows are on their way at once.
TEST(MeansSpec, AreSumsInAFixedOrder) {
  const std::vector<SequenceShape> sequences = {{300, 300}, {70, 700}};
  CheckMeans<64>({{1, 1, 64, sequences}, DType::kBF16, {}});
  CheckMeans<96>({{1, 1, 96, sequences}, DType::kBF16, {}});
  CheckMeans<128>(
      {{1, 1, 128, sequences}, DType::kBF16, {.method = Method::kMeanPooling}});
  CheckMeans<256>({{1, 1, 256, {{30, 300}}}, DType::kBF16, {}});
}

// What selection leaves of one sequence.
struct Selected {
  std::vector<float> importance, key_means, query_means, columns, diagonals;
  std::vector<int32_t> order;
  std::vector<std::vector<uint16_t>> lists;

  bool operator==(const Selected&) const = default;
};

// What a finished run left of a sequence.
Selected WhatIsLeftOf(int32_t sequence, const cuda::CudaAttentionPlan& plan,
                      const std::byte* workspace) {
  AttentionReport report;
  cuda::TellRequested(plan, workspace, {.order = true, .lists = true}, &report);
  const AttentionGeometry& g = plan.geometry;
  const SequenceGeometry& s = g.sequences[sequence];
  const auto append = [](auto& to, const auto* from, int64_t count) {
    to.insert(to.end(), from, from + count);
  };
  Selected selected;
  for (int32_t head = 0; head < g.num_order_heads; ++head) {
    append(selected.order, report.order.data() + head * g.total_k + s.k_begin, s.k_len);
    if (plan.orders) {
      append(selected.importance,
             At<float>(workspace, plan.importance_at) + head * g.total_slots +
                 s.slot_begin,
             s.k_len / g.segment_size * g.segment_size);
    }
    for (int32_t d = 0; d < g.head_dim; ++d) {
      append(selected.key_means,
             At<float>(workspace, plan.pooled_keys_at) +
                 (int64_t{head} * g.head_dim + d) * plan.total_key_blocks +
                 s.slot_begin / 128,
             s.num_key_blocks);
    }
  }
  if (plan.pools_queries) {
    append(selected.query_means,
           At<float>(workspace, plan.pooled_queries_at) +
               s.query_block_begin * g.num_heads * g.head_dim,
           int64_t{s.num_query_blocks} * g.num_heads * g.head_dim);
  }
  for (int32_t head = 0; head < g.num_heads; ++head) {
    if (plan.total_line_chunks > 0) {
      const int64_t first = head * g.total_slots + s.slot_begin;
      append(selected.columns, At<float>(workspace, plan.columns_at) + first, s.k_len);
      append(selected.diagonals, At<float>(workspace, plan.diagonals_at) + first,
             s.k_len);
    }
    for (int32_t i = 0; i < s.num_query_blocks; ++i) {
      const auto list = report.lists.View().Row(g.ListRow(sequence, head, i));
      selected.lists.emplace_back(list.begin(), list.end());
    }
  }
  return selected;
}

// Runs the problem with these sequences spoiled; what is left of all.
void SelectBeside(const AttentionProblem& problem, PipelineInputs::Layout layout,
                  const std::vector<int32_t>& spoiled,
                  std::vector<Selected>* sequences) {
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  PipelineInputs inputs(problem, 5, layout);
  for (int32_t sequence : spoiled) inputs.Spoil(sequence);
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  for (size_t n = 0; n < problem.shape.sequences.size(); ++n) {
    sequences->push_back(
        WhatIsLeftOf(static_cast<int32_t>(n), **plan, run.workspace()));
  }
}

TEST(StoreThresholdsSpec, MoreHeadsThanOneLaunchHoldsAreAllStored) {
  DeviceArray<float> target(kNumHeadsMax);
  GlobalMemory::Clear();
  target.Allow();
  std::vector<float> thresholds;
  for (int32_t head = 0; head < kNumHeadsMax; ++head) {
    thresholds.push_back(static_cast<float>(head + 1) / kNumHeadsMax);
  }
  cuda::RunParams run{};
  run.selection.head_thresholds = target.data();
  run.head_thresholds = thresholds;
  EmulatorLauncher launcher;
  cuda::EnqueueStoreThresholds(run, launcher);
  ASSERT_TRUE(launcher.fault.ok()) << launcher.fault.ToString();
  EXPECT_EQ(launcher.launches, 2);
  EXPECT_EQ(std::vector<float>(target.data(), target.data() + kNumHeadsMax),
            thresholds);
}

TEST(IsolationSpec, BadRowsOfANeighbourChangeNoBitOfWhatIsSelected) {
  using Layout = PipelineInputs::Layout;
  const std::vector<SequenceShape> sequences = {{20, 400}, {30, 330}, {10, 300}};
  AttentionOptions pbs = {.segment_size = 128, .threshold = 0.4f};
  AttentionOptions query_heads = pbs;
  query_heads.scope = Scope::kQueryHead;
  const AttentionOptions pooling = {.method = Method::kMeanPooling, .threshold = 0.4f};
  const AttentionOptions prism = {.method = Method::kPrism, .threshold = 0.4f};
  const AttentionOptions rows = {.method = Method::kFlashPrefill, .alpha = 0.9f};
  const AttentionOptions lines = {
      .method = Method::kFlexPrefill, .gamma = 0.5f, .tau = 0};
  AttentionOptions grid = lines;
  grid.tau = 1;
  for (const AttentionOptions& options :
       {pbs, query_heads, pooling, prism, rows, lines, grid}) {
    const AttentionProblem problem = {{2, 1, 64, sequences}, DType::kBF16, options};
    for (const Layout layout : {Layout::kPacked, Layout::kStrided}) {
      SCOPED_TRACE(testing::Message()
                   << MethodName(options.method) << ", " << ScopeName(options.scope)
                   << (layout == Layout::kPacked ? ", packed" : ", strided"));
      std::vector<Selected> clean, beside_the_middle, beside_the_ends;
      SelectBeside(problem, layout, {}, &clean);
      SelectBeside(problem, layout, {1}, &beside_the_middle);
      SelectBeside(problem, layout, {0, 2}, &beside_the_ends);
      ASSERT_EQ(beside_the_ends.size(), 3u);
      EXPECT_TRUE(beside_the_middle[0] == clean[0]);
      EXPECT_TRUE(beside_the_middle[2] == clean[2]);
      EXPECT_FALSE(beside_the_middle[1] == clean[1]);
      EXPECT_TRUE(beside_the_ends[1] == clean[1]);
    }
  }
}

TEST(TileOrderSpec, LongestListsComeFirstInEverySectionAndEveryTileComesOnce) {
  for (const TileOrderSetting& setting : TileOrderSettings()) {
    SCOPED_TRACE(setting.name);
    for (uint32_t seed : {1u, 2u}) {
      TileOrderCase tiles(setting.problem, setting.density, seed, setting.wide_tiles);
      EXPECT_EQ(tiles.Run(seed), "") << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace pbs::emulator
