// Spec: cuda/plan/cuda_plan.h and the index arithmetic of cuda/selection. No device.
#include "cuda/plan/cuda_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "cuda/plan/mapped_operand.h"
#include "tests/support/case_name.h"

namespace pbs::cuda {
namespace {

using testing::HasSubstr;

constexpr DeviceTraits kDevice;

AttentionProblem Problem(int32_t tokens, const AttentionOptions& options = {}) {
  return {{32, 8, 128, {{tokens, tokens}}}, DType::kBF16, options};
}

struct RefusedCase {
  const char* name;
  void (*change)(AttentionProblem&);
  const char* reason;
};

void PrintTo(const RefusedCase& c, std::ostream* out) { *out << c.name; }

class RefusedProblemSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedProblemSpec, NamesFieldValueAndWhatThereIs) {
  AttentionProblem problem = Problem(1000);
  GetParam().change(problem);
  const auto plan = MakeCudaPlan(problem, kDevice);
  EXPECT_EQ(plan.status().code(), StatusCode::kUnimplemented);
  EXPECT_THAT(plan.status().message(), HasSubstr(GetParam().reason));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedProblemSpec,
    testing::Values(
        RefusedCase{"f32", [](auto& p) { p.dtype = DType::kF32; },
                    "dtype f32 is not supported by the cuda backend, which has f16 and "
                    "bf16"},
        RefusedCase{"narrow_head", [](auto& p) { p.shape.head_dim = 32; },
                    "head_dim 32 is not supported by the cuda backend, which has 64, "
                    "96, 128 and 256"},
        RefusedCase{
            "small_blocks", [](auto& p) { p.options.block_size = 64; },
            "block_size 64 is not supported by the cuda backend, which has 128"},
        RefusedCase{"method",
                    [](auto& p) { p.options = DefaultOptions(Method::kMInference); },
                    "method minference is not supported by the cuda backend, which has "
                    "dense, pbs, mean_pooling, xattention, flexprefill, prism, "
                    "flashprefill"}),
    testing_support::CaseName());

TEST(CudaPlanSpec, WhatNoBackendTakesIsInvalid) {
  AttentionProblem problem = Problem(1000);
  problem.options.threshold = 2;
  EXPECT_EQ(MakeCudaPlan(problem, kDevice).status().code(),
            StatusCode::kInvalidArgument);
}

struct StageCase {
  const char* name;
  int32_t tokens;
  AttentionOptions options;
  bool orders, permutes, selects, has_lists;
};

void PrintTo(const StageCase& c, std::ostream* out) { *out << c.name; }

class StagesSpec : public testing::TestWithParam<StageCase> {};

TEST_P(StagesSpec, AreThoseThatTheMethodNeeds) {
  const StageCase& c = GetParam();
  const auto plan = MakeCudaPlan(Problem(c.tokens, c.options), kDevice);
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  EXPECT_EQ((*plan)->orders, c.orders);
  EXPECT_EQ((*plan)->permutes, c.permutes);
  EXPECT_EQ((*plan)->selects, c.selects);
  EXPECT_EQ((*plan)->has_lists, c.has_lists);
  EXPECT_EQ((*plan)->corrects, c.has_lists && c.options.mean_correction);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, StagesSpec,
    testing::Values(
        StageCase{
            "dense", 4096, {.method = Method::kDense}, false, false, false, false},
        StageCase{"pbs", 4096, {}, true, true, true, true},
        StageCase{"pbs_of_one_segment", 256, {}, false, false, false, false},
        StageCase{
            "own_order", 4096, {.use_given_order = true}, false, true, true, true},
        StageCase{
            "own_lists", 4096, {.use_given_lists = true}, true, true, false, true},
        StageCase{"own_order_and_lists",
                  4096,
                  {.use_given_order = true, .use_given_lists = true},
                  false,
                  true,
                  false,
                  true},
        StageCase{"prism", 4096, DefaultOptions(Method::kPrism), false, false, true,
                  true},
        StageCase{"flashprefill", 4096, DefaultOptions(Method::kFlashPrefill), false,
                  false, true, true},
        StageCase{"flexprefill", 4096, DefaultOptions(Method::kFlexPrefill), false,
                  false, true, true},
        StageCase{"flexprefill_of_two_blocks", 256,
                  DefaultOptions(Method::kFlexPrefill), false, false, false, false},
        StageCase{"mean_pooling_of_sorted_keys",
                  4096,
                  {.method = Method::kMeanPooling, .permute = true},
                  true,
                  true,
                  true,
                  true},
        StageCase{"corrected", 4096, {.mean_correction = true}, true, true, true, true},
        StageCase{"corrected_of_one_segment",
                  256,
                  {.mean_correction = true},
                  false,
                  false,
                  false,
                  false},
        StageCase{"mean_pooling",
                  4096,
                  {.method = Method::kMeanPooling},
                  false,
                  false,
                  true,
                  true}),
    testing_support::CaseName());

// Permuted keys and values once per KV head, lists of two bytes an entry: linear and
// quadratic with a small factor.
TEST(CudaPlanSpec, MemoryAt128KAnd512KIsWhatTheTablesSay) {
  for (const int64_t tokens : {int64_t{128} << 10, int64_t{512} << 10}) {
    const auto plan = MakeCudaPlan(Problem(static_cast<int32_t>(tokens)), kDevice);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    const AttentionMemory& memory = (*plan)->memory;
    const int64_t blocks = tokens / 128;
    EXPECT_EQ(memory.packed_bytes, 2 * 8 * tokens * 128 * 2);
    EXPECT_EQ(memory.order_bytes, 8 * tokens * 4);
    // Two blocks of a segment read up to its end: blocks (blocks + 2) / 2 entries.
    EXPECT_EQ(memory.lists_bytes,
              2 * 32 * (blocks * (blocks + 2) / 2) + 2 * 32 * blocks);
    EXPECT_LT((*plan)->workspace_bytes, 2 * memory.packed_bytes + memory.lists_bytes);
  }
}

TEST(CudaPlanSpec, SamplesTheRowsThatEveryBackendSamples) {
  for (const int32_t q_len : {1, 7, 1000, 1 << 20}) {
    for (const int32_t rows : {1, 3, 1024}) {
      const int32_t sampled = SampledRows(rows, q_len);
      EXPECT_EQ(sampled, std::min(rows, q_len));
      for (int32_t i = 0; i < sampled; ++i) {
        ASSERT_EQ(SampledRow(i, sampled, q_len), CoverageRow(i, sampled, q_len));
      }
    }
  }
}

TEST(CudaPlanSpec, CoverageTakesAFloatOfASampledRowInGroupsOfEight) {
  AttentionProblem problem = Problem(0, {.coverage_rows = 10});
  problem.shape.sequences = {{1000, 1000}, {5, 700}, {100, 100}, {0, 300}};
  const auto measured = MakeCudaPlan(problem, kDevice);
  problem.options.coverage_rows = 0;
  const auto plain = MakeCudaPlan(problem, kDevice);
  ASSERT_TRUE(measured.ok() && plain.ok());
  // Two groups of the first, one of the second; the others run dense.
  EXPECT_EQ((*measured)->coverage_groups, 3);
  EXPECT_EQ((*measured)->summary_bytes - (*plain)->summary_bytes, 32 * 3 * 8 * 4);
  EXPECT_EQ((*measured)->workspace_bytes - (*plain)->workspace_bytes, 32 * 3 * 8 * 4);
  EXPECT_EQ((*plain)->coverage_groups, 0);
}

// What a report copies, however long the prompt is: pieces of 256 bytes.
TEST(CudaPlanSpec, ASummaryIsAKibibyteAtMostForOnePrompt) {
  const auto bytes = [](const AttentionOptions& options) {
    const auto plan = MakeCudaPlan(Problem(128 << 10, options), kDevice);
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    return (*plan)->summary_bytes;
  };
  EXPECT_EQ(bytes({.method = Method::kDense}), 256);
  EXPECT_EQ(bytes({}), 256 + 32 * 16);
  EXPECT_EQ(bytes({.dense_fallback = true}), 256 + 32 * 16 + 256);
}

TEST(CudaPlanSpec, QueryHeadScopeTakesAsManyCopiesAsQueryHeads) {
  const auto kv = MakeCudaPlan(Problem(8192), kDevice);
  const auto q = MakeCudaPlan(Problem(8192, {.scope = Scope::kQueryHead}), kDevice);
  ASSERT_TRUE(kv.ok() && q.ok());
  EXPECT_EQ((*q)->memory.packed_bytes, 4 * (*kv)->memory.packed_bytes);
}

// A float for each key and distance; one for each place of a list where a head may
// select by block means, which need the means of query blocks.
TEST(CudaPlanSpec, FlexPrefillTakesMemoryForWhatItsHeadsMayDo) {
  const auto plan_of = [](float gamma, float tau) {
    auto plan = MakeCudaPlan(
        Problem(128 << 10,
                {.method = Method::kFlexPrefill, .gamma = gamma, .tau = tau}),
        kDevice);
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    return *std::move(plan);
  };
  const auto by_either = plan_of(0.95f, 0.1f);
  const auto by_lines = plan_of(0.95f, 0);
  EXPECT_TRUE(by_either->has_grid() && by_either->pools_queries);
  EXPECT_FALSE(by_lines->has_grid() || by_lines->pools_queries);
  EXPECT_FALSE(plan_of(1, 0.1f)->has_grid());
  constexpr int64_t kBlocks = 1024;
  constexpr int64_t kGrid = 4 * 32 * (kBlocks * (kBlocks + 1) / 2);
  constexpr int64_t kMeans = 4 * kBlocks * 32 * 128;
  constexpr int64_t kCuts = 32 * 16;
  EXPECT_EQ(by_either->workspace_bytes - by_lines->workspace_bytes,
            kGrid + kMeans + kCuts);
  EXPECT_EQ(by_lines->diagonals_at - by_lines->columns_at, 4 * 32 * (128 << 10));
  // Chunks of eight blocks.
  EXPECT_EQ(by_lines->total_line_chunks, kBlocks / 8);
}

TEST(CudaPlanSpec, QueriesThatTheCallerPoolsTakeNothingOfTheWorkspace) {
  AttentionProblem problem = Problem(1000);
  const auto own = MakeCudaPlan(problem, kDevice);
  problem.offers_pooled_queries = true;
  const auto given = MakeCudaPlan(problem, kDevice);
  ASSERT_TRUE(own.ok() && given.ok());
  EXPECT_TRUE((*own)->pools_queries);
  EXPECT_EQ((*own)->pooled_queries_bytes, 0);
  EXPECT_FALSE((*given)->pools_queries);
  EXPECT_EQ((*given)->pooled_queries_bytes, 4 * 8 * 32 * 128);
  EXPECT_EQ((*own)->workspace_bytes - (*given)->workspace_bytes,
            (*given)->pooled_queries_bytes);
}

TEST(CudaPlanSpec, TakesPooledQueriesOnlyOfOneSequenceWhoseBlocksItSelects) {
  const auto taken = [](const AttentionProblem& problem) {
    AttentionProblem offered = problem;
    offered.offers_pooled_queries = true;
    const auto plan = MakeCudaPlan(offered, kDevice);
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    return (*plan)->pooled_queries_bytes;
  };
  EXPECT_EQ(taken(Problem(256)), 0);
  EXPECT_EQ(taken(Problem(4096, {.method = Method::kDense})), 0);
  EXPECT_EQ(taken(Problem(4096, {.use_given_lists = true})), 0);
  EXPECT_EQ(taken(Problem(4096, DefaultOptions(Method::kFlashPrefill))), 0);
  EXPECT_EQ(taken(Problem(4096, DefaultOptions(Method::kFlexPrefill))),
            4 * 32 * 32 * 128);
  AttentionProblem two = Problem(1000);
  two.shape.sequences = {{1000, 1000}, {700, 700}};
  EXPECT_EQ(taken(two), 0);
  // Blocks lie on the key grid: 40 queries behind 620 keys lie in two.
  AttentionProblem past = Problem(0, {.method = Method::kMeanPooling});
  past.shape.sequences = {{40, 660}};
  EXPECT_EQ(taken(past), 4 * 2 * 32 * 128);
}

// 99 KiB, as devices of compute capability 8.6 and 8.9 have.
constexpr DeviceTraits kSmall{.shared_bytes_max = 99 << 10};

TEST(CudaPlanSpec, ChunksOfKeysFitSharedMemoryWithTheirScores) {
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    AttentionProblem problem = Problem(128 << 10);
    problem.shape.head_dim = head_dim;
    const auto plan = MakeCudaPlan(problem, kSmall);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    EXPECT_LE(ScoreSharedBytes(head_dim, (*plan)->chunk_blocks),
              kSmall.shared_bytes_max);
    EXPECT_EQ((*plan)->chunk_blocks, head_dim == 256 ? 4 : kChunkBlocksMax);
    EXPECT_LE(LinesSharedBytes(head_dim, (*plan)->chunk_blocks),
              kSmall.shared_bytes_max);
    EXPECT_EQ((*MakeCudaPlan(problem, kDevice))->chunk_blocks, kChunkBlocksMax);
  }
}

TEST(CudaPlanSpec, BlockScoresFitSharedMemoryOrTheRefusalSaysHowMuchTheyTake) {
  // On a small device up to 512K tokens.
  for (const int32_t tokens : {1000, 128 << 10, 512 << 10}) {
    const auto plan = MakeCudaPlan(Problem(tokens), kSmall);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    EXPECT_GE((*plan)->logit_stride * 128, tokens);
  }
  EXPECT_TRUE(MakeCudaPlan(Problem(1 << 20), kDevice).ok());
  EXPECT_EQ(MakeCudaPlan(Problem(1 << 20), kSmall).status().message(),
            "block scores of the longest sequence take 133120 bytes of shared memory; "
            "this device has 101376");
}

TEST(ListOffsetSpec, FollowsTheGeometryUpToAMillionTokens) {
  struct Case {
    int32_t q_len, k_len, segment_size;
  };
  for (const Case& c : {Case{1000, 1000, 256}, Case{700, 1000, 384}, Case{1, 513, 128},
                        Case{512 << 10, 512 << 10, 256}, Case{1 << 20, 1 << 20, 512}}) {
    AttentionProblem problem = Problem(0, {.segment_size = c.segment_size});
    problem.shape.num_heads = 128;
    problem.shape.sequences = {{600, 600}, {c.q_len, c.k_len}};
    const auto plan = MakeCudaPlan(problem, kDevice);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    const AttentionGeometry& g = (*plan)->geometry;
    const SequenceGeometry& s = g.sequences[1];
    const SequenceRecord& record = (*plan)->sequences[1];
    for (const int32_t head : {0, 127}) {
      int64_t expected = s.entries_begin + head * s.entries_per_head;
      for (int32_t i = 0; i < s.num_query_blocks; ++i) {
        ASSERT_EQ(EntryOffset(record, head, i, g.blocks_per_segment), expected)
            << c.k_len << " tokens, head " << head << ", query block " << i;
        ASSERT_EQ(ListRow(record, g.num_heads, head, i), g.ListRow(1, head, i));
        expected += g.RowCapacity(s, s.first_query_block + i);
      }
    }
    const int64_t last =
        EntryOffset(record, 127, s.num_query_blocks - 1, g.blocks_per_segment);
    EXPECT_EQ(last + g.RowCapacity(s, s.num_key_blocks - 1), g.total_entries);
  }
}

TEST(RowStridesSpec, ReachTheLastRowOf512KTokens) {
  constexpr int64_t kTokens = 512 << 10;
  constexpr int64_t kDim = 256;
  const RowStrides packed{0, 4 * kTokens * kDim, kDim, 1};
  EXPECT_EQ(packed.Offset(3, 3 * kTokens, 63, kTokens - 1),
            (63 * 4 * kTokens + 3 * kTokens + kTokens - 1) * kDim);
  const RowStrides strided{64 * kTokens * kDim, kTokens * kDim, kDim, 0};
  EXPECT_EQ(strided.Offset(3, 3 * kTokens, 63, kTokens - 1),
            ((3 * 64 + 63) * kTokens + kTokens - 1) * kDim);
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
