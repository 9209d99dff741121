// Spec: cuda/plan/cuda_plan.h and the index arithmetic of cuda/selection. No device.
#include "cuda/plan/cuda_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <utility>

#include "methods/vertical_slash.h"
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
        RefusedCase{"columns_of_all_keys",
                    [](auto& p) {
                      p = Problem(1 << 20, {.method = Method::kMInference,
                                            .vertical_tokens = 1 << 20});
                      p.shape.num_kv_heads = 4;
                    },
                    "vertical_tokens 1048576 gives 73728 blocks of keys and gathered "
                    "columns per KV head; the cuda backend has at most 65536"}),
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
        // Without an order, too, keys are copied, with the columns behind them.
        StageCase{"minference", 8192, DefaultOptions(Method::kMInference), false, true,
                  true, true},
        StageCase{"minference_of_a_short_prompt", 6096,
                  DefaultOptions(Method::kMInference), false, false, false, false},
        StageCase{"minference_over_given_lists",
                  8192,
                  {.method = Method::kMInference, .use_given_lists = true},
                  false,
                  false,
                  false,
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

// 1,000 columns are eight blocks. Beside the copies of keys and values, per query head:
// these blocks, 8 + 2 bytes per entry, and a bit per key for columns and for distances.
TEST(CudaPlanSpec, ColumnsAndDistancesAreAsManyAsOnTheCpu) {
  EXPECT_EQ(kKeyLineQueries, kLineQueries);
  EXPECT_EQ(kRowGroup, pbs::kRowGroup);
  EXPECT_EQ(kForcedColumns, pbs::kForcedColumns);
  EXPECT_EQ(kForcedDistances, pbs::kForcedDistances);
  for (const int32_t wanted : {1, 29, 31, 49, 51, 1000}) {
    for (const int32_t k_len : {10, 40, 2000}) {
      EXPECT_EQ(NumColumns(wanted, k_len), pbs::NumColumns(wanted, k_len));
      EXPECT_EQ(NumDistances(wanted, k_len), pbs::NumDistances(wanted, k_len));
    }
  }
}

TEST(CudaPlanSpec, MemoryOfColumnsAndDiagonalsAt128KIsWhatTheTablesSay) {
  constexpr int64_t kTokens = 128 << 10;
  constexpr int64_t kBlocks = kTokens / 128;
  const auto plan =
      MakeCudaPlan(Problem(kTokens, DefaultOptions(Method::kMInference)), kDevice);
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  EXPECT_EQ((*plan)->total_gathered, 8);
  EXPECT_EQ((*plan)->copied_blocks, kBlocks + 4 * 8);
  const AttentionMemory& memory = (*plan)->memory;
  EXPECT_EQ(memory.packed_bytes, 2 * (8 * kTokens + 32 * 1024) * 128 * 2);
  EXPECT_EQ(memory.order_bytes, (8 * kTokens + 32 * 1024) * 4);
  const int64_t entries = 32 * (kBlocks * (kBlocks + 1) / 2 + kBlocks * 8);
  EXPECT_EQ((*plan)->total_entries, entries);
  EXPECT_EQ(memory.lists_bytes, (2 + 8) * entries + 32 * kBlocks * (2 + 2 + 4) +
                                    2 * 32 * kTokens / 8 + 32 * 1024 * 4);
  // Masses by key, by diagonal and by distance; per chunk of 8 blocks, two sums of the
  // queries and the diagonals behind it; per query, shift and weight.
  EXPECT_EQ(memory.pooled_bytes, 32 * 128 * 4 * (3 * kBlocks + 3 * kBlocks / 8 + 2));
  EXPECT_LT((*plan)->workspace_bytes, 900 << 20);
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

}  // namespace
}  // namespace pbs::cuda
