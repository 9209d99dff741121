// Spec: cuda/selection, what single kernels leave behind: the means of blocks, bit by
// bit, and the order of attention's tiles.
#include <gtest/gtest.h>

#include <vector>

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

TEST(TileOrderSpec, LongestListsComeFirstInEverySectionAndEveryTileComesOnce) {
  for (const TileOrderSetting& setting : TileOrderSettings()) {
    SCOPED_TRACE(setting.name);
    for (uint32_t seed : {1u, 2u}) {
      TileOrderCase tiles(setting.problem, setting.density, seed);
      EXPECT_EQ(tiles.Run(seed), "") << "seed " << seed;
    }
  }
}

}  // namespace
}  // namespace pbs::emulator
