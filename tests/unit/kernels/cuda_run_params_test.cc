// Spec: MakeRunParams() of cuda/plan/cuda_plan.h, and tensor maps of operands
// (cuda/plan/mapped_operand.h). No device.
#include "cuda/plan/cuda_plan.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "cuda/plan/mapped_operand.h"
#include "tests/support/case_name.h"

namespace pbs::cuda {
namespace {

constexpr DeviceTraits kDevice;

AttentionProblem Problem(int32_t tokens, const AttentionOptions& options = {}) {
  return {{32, 8, 128, {{tokens, tokens}}}, DType::kBF16, options};
}

TEST(RunParamsSpec, OperandsMustBeWhereCopiesOf16BytesCanReadThem) {
  const auto plan = MakeCudaPlan(Problem(1000), kDevice);
  ASSERT_TRUE(plan.ok());
  alignas(256) static std::byte memory[256];
  const Workspace workspace{memory, (*plan)->workspace_bytes};  // not touched here
  AttentionTensors tensors;
  tensors.q = tensors.k = tensors.v = {memory, PackedLayout(1000, 128)};
  tensors.o = {memory, PackedLayout(1000, 128)};
  EXPECT_TRUE(MakeRunParams(**plan, tensors, workspace).ok());

  AttentionTensors misaligned = tensors;
  misaligned.k.data = memory + 8;
  EXPECT_EQ(MakeRunParams(**plan, misaligned, workspace).status().message(),
            "k is not 16-byte aligned");
  AttentionTensors odd = tensors;
  odd.v.layout.row_stride = 132;
  EXPECT_EQ(MakeRunParams(**plan, odd, workspace).status().message(),
            "v has a stride of 132 elements, not a multiple of 8");
  AttentionTensors target = tensors;
  target.o.data = memory + 4;
  EXPECT_EQ(MakeRunParams(**plan, target, workspace).status().message(),
            "o is not 16-byte aligned");
  const auto small =
      MakeRunParams(**plan, tensors, {memory, (*plan)->workspace_bytes - 1});
  EXPECT_EQ(small.status().code(), StatusCode::kResourceExhausted);
}

TEST(RunParamsSpec, ThresholdsOfHeadsMustFitTheProblem) {
  AttentionProblem problem = Problem(1000);
  problem.has_head_thresholds = true;
  const auto plan = MakeCudaPlan(problem, kDevice);
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  alignas(256) static std::byte memory[256];
  AttentionTensors tensors;
  tensors.q = tensors.k = tensors.v = {memory, PackedLayout(1000, 128)};
  tensors.o = {memory, PackedLayout(1000, 128)};
  const Workspace workspace{memory, (*plan)->workspace_bytes};  // not touched here
  const auto heads = static_cast<size_t>(problem.shape.num_heads);
  EXPECT_EQ(MakeRunParams(**plan, tensors, workspace).status().message(),
            "head_thresholds has 0 values; the problem has " + std::to_string(heads));
  const std::vector<float> thresholds(heads, 0.5f);
  tensors.head_thresholds = thresholds;
  const auto run = MakeRunParams(**plan, tensors, workspace);
  ASSERT_TRUE(run.ok()) << run.status().ToString();
  EXPECT_EQ(run->head_thresholds.data(), thresholds.data());
}

TEST(RunParamsSpec, PooledQueriesThatWereOfferedMustBeThere) {
  AttentionProblem problem = Problem(1000);
  problem.offers_pooled_queries = true;
  const auto plan = MakeCudaPlan(problem, kDevice);
  ASSERT_TRUE(plan.ok());
  alignas(256) static std::byte memory[256];
  AttentionTensors tensors;
  tensors.q = tensors.k = tensors.v = {memory, PackedLayout(1000, 128)};
  tensors.o = {memory, PackedLayout(1000, 128)};
  const Workspace workspace{memory, (*plan)->workspace_bytes};  // not touched here
  EXPECT_EQ(MakeRunParams(**plan, tensors, workspace).status().message(),
            "pooled_queries is null, the plan needs 131072 bytes");
  tensors.pooled_queries = reinterpret_cast<const float*>(memory);
  const auto run = MakeRunParams(**plan, tensors, workspace);
  ASSERT_TRUE(run.ok()) << run.status().ToString();
  EXPECT_EQ(run->selection.pooled_queries, tensors.pooled_queries);
}

TEST(RunParamsSpec, NothingIsBroadcastWhereThereIsMoreThanOne) {
  alignas(256) static std::byte memory[256];
  const auto message_of = [](const AttentionShape& shape, const RowLayout& k_layout) {
    const auto plan = MakeCudaPlan({shape, DType::kBF16, {}}, kDevice);
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    AttentionTensors tensors;
    tensors.q = tensors.v = {memory, DenseBatchLayout(32, 1000, 128)};
    tensors.k = {memory, k_layout};
    tensors.o = {memory, DenseBatchLayout(32, 1000, 128)};
    const auto run = MakeRunParams(**plan, tensors, {memory, (*plan)->workspace_bytes});
    return run.ok() ? "" : run.status().message();
  };
  const std::vector<SequenceShape> one = {{1000, 1000}};
  const std::vector<SequenceShape> two = {{1000, 1000}, {7, 9}};
  EXPECT_EQ(message_of({32, 8, 128, two}, {0, 128000, 128}),
            "k.sequence_stride 0 is not positive");
  EXPECT_EQ(message_of({32, 8, 128, one}, {0, 0, 128}),
            "k.head_stride 0 is not positive");
  EXPECT_EQ(message_of({32, 8, 128, one}, {RowLayout::kPacked, 128000, -128}),
            "k.row_stride -128 is not positive");
  EXPECT_EQ(message_of({32, 1, 128, one}, {0, 0, 128}), "");
  EXPECT_EQ(message_of({32, 1, 128, {{1, 1}}}, {0, 0, 0}), "");
}

// Extents and strides of what Hopper's copy engine is told.
struct MapCase {
  const char* name;
  Method method;
  std::vector<SequenceShape> sequences;
  RowLayout layout;              // of q, k, v and o
  std::array<int64_t, 3> sizes;  // of k: rows, heads, sequences
  std::array<uint64_t, 3> strides;
};

void PrintTo(const MapCase& c, std::ostream* out) { *out << c.name; }

class MappedOperandSpec : public testing::TestWithParam<MapCase> {};

TEST_P(MappedOperandSpec, ReachesAsFarAsTheKeys) {
  const MapCase& c = GetParam();
  const auto plan = MakeCudaPlan(
      {{4, 2, 64, c.sequences}, DType::kBF16, {.method = c.method}}, kDevice);
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  alignas(256) static std::byte memory[256];
  AttentionTensors tensors;
  tensors.q = tensors.k = tensors.v = {memory, c.layout};
  tensors.o = {memory, c.layout};
  const auto run = MakeRunParams(**plan, tensors, {memory, (*plan)->workspace_bytes});
  ASSERT_TRUE(run.ok()) << run.status().ToString();
  const MappedOperand k = MapOperands(**plan, *run).k;
  EXPECT_EQ((std::array<int64_t, 3>{k.rows, k.heads, k.sequences}), c.sizes);
  EXPECT_EQ(MapStrides(k), c.strides);
}

INSTANTIATE_TEST_SUITE_P(Cases, MappedOperandSpec,
                         testing::Values(MapCase{"packed",
                                                 Method::kDense,
                                                 {{700, 700}, {9, 600}},
                                                 PackedLayout(1300, 64),
                                                 {1300, 2, 1},
                                                 {128, 1300 * 128, 2 * 1300 * 128}},
                                         MapCase{"strided",
                                                 Method::kDense,
                                                 {{700, 700}, {9, 600}},
                                                 DenseBatchLayout(4, 1024, 64),
                                                 {700, 2, 2},
                                                 {128, 1024 * 128, 4 * 1024 * 128}},
                                         MapCase{
                                             "gathered",
                                             Method::kPbs,
                                             {{700, 700}, {9, 600}},
                                             PackedLayout(1300, 64),
                                             {(6 + 5) * 128, 2, 1},
                                             {128, 11 * 128 * 128, 2 * 11 * 128 * 128}},
                                         MapCase{"dimensions_of_one_without_strides",
                                                 Method::kDense,
                                                 {{1, 1}},
                                                 {0, 64, 0},
                                                 {1, 2, 1},
                                                 {128, 128, 256}}),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::cuda
