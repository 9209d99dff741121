// Spec: ValidateProblem() and MakeGeometry() in kernels/include/pbs/attention.h.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "pbs/attention.h"
#include "tests/support/case_name.h"

namespace pbs {
namespace {

AttentionProblem GoodProblem() {
  AttentionProblem problem;
  problem.shape = {
      .num_heads = 4, .num_kv_heads = 2, .head_dim = 64, .sequences = {{300, 300}}};
  return problem;
}

struct ProblemCase {
  const char* name;
  std::function<void(AttentionProblem&)> change;
  const char* message;  // "" when accepted
};

class ValidateProblemSpec : public testing::TestWithParam<ProblemCase> {};

TEST_P(ValidateProblemSpec, NamesFieldValueAndLimit) {
  AttentionProblem problem = GoodProblem();
  GetParam().change(problem);
  const Status status = ValidateProblem(problem);
  EXPECT_EQ(status.message(), GetParam().message);
  EXPECT_EQ(status.ok(), GetParam().message[0] == '\0');
  if (!status.ok()) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ValidateProblemSpec,
    testing::Values(
        ProblemCase{"good", [](auto&) {}, ""},
        ProblemCase{"no_heads", [](auto& p) { p.shape.num_heads = 0; },
                    "num_heads 0 is outside [1, 1024]"},
        ProblemCase{"heads_at_the_limit",
                    [](auto& p) { p.shape.num_heads = kNumHeadsMax; }, ""},
        ProblemCase{"heads_past_the_limit",
                    [](auto& p) { p.shape.num_heads = kNumHeadsMax + 1; },
                    "num_heads 1025 is outside [1, 1024]"},
        ProblemCase{"more_kv_heads_than_heads",
                    [](auto& p) { p.shape.num_kv_heads = 5; },
                    "num_kv_heads 5 is outside [1, 4]"},
        ProblemCase{"heads_not_a_multiple", [](auto& p) { p.shape.num_kv_heads = 3; },
                    "num_heads 4 is not a multiple of num_kv_heads 3"},
        ProblemCase{"head_dim", [](auto& p) { p.shape.head_dim = 80; },
                    "head_dim 80 is not one of 32, 64, 96, 128, 256"},
        ProblemCase{"no_sequences", [](auto& p) { p.shape.sequences.clear(); },
                    "number of sequences 0 is outside [1, 65536]"},
        ProblemCase{"empty_sequence",
                    [](auto& p) {
                      p.shape.sequences = {{0, 0}};
                    },
                    ""},
        ProblemCase{"one_token",
                    [](auto& p) {
                      p.shape.sequences = {{1, 1}};
                    },
                    ""},
        ProblemCase{"more_queries_than_keys",
                    [](auto& p) {
                      p.shape.sequences = {{3, 3}, {5, 4}};
                    },
                    "q_len of sequence 1 5 is outside [0, 4]"},
        ProblemCase{"keys_at_the_limit",
                    [](auto& p) {
                      p.shape.sequences = {{1, kSeqLenMax}};
                    },
                    ""},
        ProblemCase{"keys_past_the_limit",
                    [](auto& p) {
                      p.shape.sequences = {{1, kSeqLenMax + 1}};
                    },
                    "k_len of sequence 0 1048577 is outside [0, 1048576]"},
        ProblemCase{
            "too_many_small_blocks",
            [](auto& p) {
              p.options.block_size = 16;
              p.shape.sequences = {{1, kSeqLenMax}};
            },
            "k_len 1048576 of sequence 0 has 65536 blocks of block_size 16, more "
            "than 65535; use a larger block_size"},
        ProblemCase{"heads_times_sequences_at_the_limit",
                    [](auto& p) {
                      p.shape.sequences.assign(kNumSequencesMax, {1, 1});
                    },
                    ""},
        ProblemCase{"heads_times_sequences_past_the_limit",
                    [](auto& p) {
                      p.shape.num_heads = 6;
                      p.shape.sequences.assign(43'691, {1, 1});
                    },
                    "num_heads x number of sequences 262146 is outside [1, 262144]"},
        ProblemCase{"batch_past_the_limit",
                    [](auto& p) {
                      p.shape.sequences.assign(17, {1, kSeqLenMax});
                    },
                    "total k_len of the batch 17825792 is outside [0, 16777216]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    HeadThresholds, ValidateProblemSpec,
    testing::Values(
        ProblemCase{"of_a_threshold_method",
                    [](auto& p) {
                      p.options = DefaultOptions(Method::kPrism);
                      p.has_head_thresholds = true;
                    },
                    ""},
        ProblemCase{"of_another_method",
                    [](auto& p) {
                      p.options = DefaultOptions(Method::kFlexPrefill);
                      p.has_head_thresholds = true;
                    },
                    "method flexprefill has no head_thresholds; pbs, mean_pooling, "
                    "xattention, prism have them"},
        ProblemCase{"with_given_lists",
                    [](auto& p) {
                      p.options.use_given_lists = true;
                      p.has_head_thresholds = true;
                    },
                    "use_given_lists and head_thresholds exclude each other"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Options, ValidateProblemSpec,
    testing::Values(
        ProblemCase{"block_not_a_power_of_two",
                    [](auto& p) { p.options.block_size = 96; },
                    "block_size 96 is not a power of two in [16, 256]"},
        ProblemCase{"block_too_small", [](auto& p) { p.options.block_size = 8; },
                    "block_size 8 is not a power of two in [16, 256]"},
        ProblemCase{"segment_not_a_multiple",
                    [](auto& p) { p.options.segment_size = 200; },
                    "segment_size 200 is not a multiple of block_size 128"},
        ProblemCase{"segment_zero", [](auto& p) { p.options.segment_size = 0; },
                    "segment_size 0 is outside [1, 16384]"},
        ProblemCase{"segment_past_the_limit",
                    [](auto& p) { p.options.segment_size = 16'512; },
                    "segment_size 16512 is outside [1, 16384]"},
        ProblemCase{"threshold_zero", [](auto& p) { p.options.threshold = 0.0f; },
                    "threshold 0 is outside (0, 1]"},
        ProblemCase{"threshold_one", [](auto& p) { p.options.threshold = 1.0f; }, ""},
        ProblemCase{"threshold_above_one", [](auto& p) { p.options.threshold = 1.5f; },
                    "threshold 1.5 is outside (0, 1]"},
        ProblemCase{"threshold_nan", [](auto& p) { p.options.threshold = NAN; },
                    "threshold nan is outside (0, 1]"},
        ProblemCase{"given_lists_with_sinks",
                    [](auto& p) {
                      p.options.use_given_lists = true;
                      p.options.sink_blocks = 2;
                    },
                    "use_given_lists and sink_blocks 2 exclude each other"},
        ProblemCase{"given_lists_with_fallback",
                    [](auto& p) {
                      p.options.use_given_lists = true;
                      p.options.dense_fallback = true;
                    },
                    "use_given_lists and dense_fallback exclude each other"},
        ProblemCase{"coverage_rows_past_the_limit",
                    [](auto& p) { p.options.coverage_rows = kCoverageRowsMax + 1; },
                    "coverage_rows 1025 is outside [0, 1024]"}),
    testing_support::CaseName());

// An option of another method is refused, so that nothing that is asked for is ignored.
template <class Change>
auto With(Method method, Change change) {
  return [method, change](AttentionProblem& p) {
    p.options = DefaultOptions(method);
    change(p.options);
  };
}

INSTANTIATE_TEST_SUITE_P(
    OptionsOfOtherMethods, ValidateProblemSpec,
    testing::Values(
        ProblemCase{"dense_threshold",
                    With(Method::kDense, [](auto& o) { o.threshold = 0.5f; }),
                    "method dense has no option threshold=0.5; pbs, mean_pooling, "
                    "xattention, prism have it"},
        ProblemCase{"dense_given_lists",
                    With(Method::kDense, [](auto& o) { o.use_given_lists = true; }),
                    "method dense has no option use_given_lists=1; pbs, mean_pooling, "
                    "xattention, minference, flexprefill, prism, flashprefill have it"},
        ProblemCase{
            "order_without_sorted_keys",
            With(Method::kMeanPooling, [](auto& o) { o.use_given_order = true; }),
            "method mean_pooling has no option use_given_order=1; pbs and methods with "
            "permute have it"},
        ProblemCase{"order_with_permute",
                    With(Method::kMeanPooling,
                         [](auto& o) {
                           o.permute = true;
                           o.use_given_order = true;
                         }),
                    ""},
        ProblemCase{"pbs_permutes_always",
                    With(Method::kPbs, [](auto& o) { o.permute = true; }),
                    "method pbs has no option permute=1; mean_pooling, xattention, "
                    "minference, flexprefill, prism, flashprefill have it"},
        ProblemCase{"scope_without_sorted_keys",
                    With(Method::kPrism, [](auto& o) { o.scope = Scope::kQueryHead; }),
                    "method prism has no option scope=query_head; pbs and methods with "
                    "permute have it"},
        ProblemCase{"gamma_of_xattention",
                    With(Method::kXAttention, [](auto& o) { o.gamma = 0.5f; }),
                    "method xattention has no option gamma=0.5; flexprefill has it"},
        ProblemCase{
            "threshold_of_flashprefill",
            With(Method::kFlashPrefill, [](auto& o) { o.threshold = 0.5f; }),
            "method flashprefill has no option threshold=0.5; pbs, mean_pooling, "
            "xattention, prism have it"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    OptionsOfMethods, ValidateProblemSpec,
    testing::Values(
        ProblemCase{"stride_not_a_power_of_two",
                    With(Method::kXAttention, [](auto& o) { o.stride = 12; }),
                    "stride 12 is not a power of two in [2, 64] of at most block_size "
                    "128"},
        ProblemCase{"stride_past_the_limit",
                    With(Method::kXAttention, [](auto& o) { o.stride = 128; }),
                    "stride 128 is outside [2, 64]"},
        ProblemCase{"stride_past_the_block",
                    With(Method::kXAttention,
                         [](auto& o) {
                           o.block_size = 16;
                           o.stride = 32;
                         }),
                    "stride 32 is not a power of two in [2, 64] of at most block_size "
                    "16"},
        ProblemCase{"no_vertical_tokens",
                    With(Method::kMInference, [](auto& o) { o.vertical_tokens = 0; }),
                    "vertical_tokens 0 is outside [1, 1048576]"},
        ProblemCase{
            "slash_tokens_past_the_limit",
            With(Method::kMInference, [](auto& o) { o.slash_tokens = kSeqLenMax + 1; }),
            "slash_tokens 1048577 is outside [1, 1048576]"},
        ProblemCase{"gamma_zero",
                    With(Method::kFlexPrefill, [](auto& o) { o.gamma = 0; }),
                    "gamma 0 is outside (0, 1]"},
        ProblemCase{"tau_zero", With(Method::kFlexPrefill, [](auto& o) { o.tau = 0; }),
                    ""},
        ProblemCase{"tau_above_one",
                    With(Method::kFlexPrefill, [](auto& o) { o.tau = 1.25f; }),
                    "tau 1.25 is outside [0, 1]"},
        ProblemCase{"tau_nan", With(Method::kFlexPrefill, [](auto& o) { o.tau = NAN; }),
                    "tau nan is outside [0, 1]"},
        ProblemCase{"odd_slow_dims",
                    With(Method::kPrism, [](auto& o) { o.slow_dims = 7; }),
                    "slow_dims 7 is odd; rotary pairs have two columns"},
        ProblemCase{"fast_dims_past_the_head",
                    With(Method::kPrism, [](auto& o) { o.fast_dims = 66; }),
                    "fast_dims 66 exceeds head_dim 64"},
        ProblemCase{"fast_dims_of_the_head",
                    With(Method::kPrism, [](auto& o) { o.fast_dims = 64; }), ""},
        ProblemCase{"alpha_zero",
                    With(Method::kFlashPrefill, [](auto& o) { o.alpha = 0; }),
                    "alpha 0 is outside (0, 1]"},
        ProblemCase{"negative_window",
                    With(Method::kFlashPrefill, [](auto& o) { o.window_blocks = -1; }),
                    "window_blocks -1 is outside [0, 65535]"}),
    testing_support::CaseName());

TEST(GeometrySpec, QueryBlocksLieOnTheAbsoluteKeyGrid) {
  AttentionProblem problem = GoodProblem();
  problem.shape.sequences = {{100, 300}, {0, 0}, {300, 300}};
  const AttentionGeometry g = MakeGeometry(problem);
  const SequenceGeometry& s = g.sequences[0];
  EXPECT_EQ(s.query_offset, 200);
  EXPECT_EQ(s.first_query_block, 1);
  EXPECT_EQ(s.num_query_blocks, 2);
  EXPECT_EQ(s.num_key_blocks, 3);
  EXPECT_EQ(g.sequences[1].num_query_blocks, 0);
  EXPECT_EQ(g.sequences[2].slot_begin, 3 * 128);
  EXPECT_EQ(g.total_slots, 6 * 128);
  EXPECT_EQ(g.ListRow(2, 1, 2), 4 * 2 + 3 + 2);
}

TEST(GeometrySpec, AQueryBlockReadsAtMostToTheEndOfItsSegment) {
  AttentionProblem problem = GoodProblem();
  problem.shape.sequences = {{700, 700}};  // 6 blocks, segments of 2
  const AttentionGeometry g = MakeGeometry(problem);
  const SequenceGeometry& s = g.sequences[0];
  EXPECT_EQ(g.RowCapacity(s, 0), 2);
  EXPECT_EQ(g.RowCapacity(s, 3), 4);
  EXPECT_EQ(g.RowCapacity(s, 5), 6);
  EXPECT_EQ(s.entries_per_head, 2 + 2 + 4 + 4 + 6 + 6);
}

TEST(GeometrySpec, OrdersBelongToKvHeadsUnlessTheScopeSaysQueryHeads) {
  AttentionProblem problem = GoodProblem();
  EXPECT_EQ(MakeGeometry(problem).num_order_heads, 2);
  EXPECT_EQ(MakeGeometry(problem).OrderHead(3), 1);
  problem.options.scope = Scope::kQueryHead;
  EXPECT_EQ(MakeGeometry(problem).num_order_heads, 4);
  EXPECT_EQ(MakeGeometry(problem).OrderHead(3), 3);
  problem.options.method = Method::kMeanPooling;
  EXPECT_EQ(MakeGeometry(problem).num_order_heads, 2);
  problem.options.permute = true;
  EXPECT_EQ(MakeGeometry(problem).num_order_heads, 4);
}

TEST(GeometrySpec, SegmentsAreSingleBlocksUnlessKeysAreSorted) {
  AttentionProblem problem = GoodProblem();
  problem.options.method = Method::kPrism;
  EXPECT_EQ(MakeGeometry(problem).blocks_per_segment, 1);
  problem.options.permute = true;
  EXPECT_EQ(MakeGeometry(problem).blocks_per_segment, 2);
}

TEST(GeometrySpec, PromptsOfAtMostOneSegmentRunDense) {
  AttentionProblem problem = GoodProblem();
  problem.shape.sequences = {{256, 256}, {257, 257}};
  const AttentionGeometry g = MakeGeometry(problem);
  EXPECT_TRUE(g.sequences[0].dense);
  EXPECT_FALSE(g.sequences[1].dense);
}

TEST(GeometrySpec, FlexprefillOfAtMostTwoBlocksRunsDense) {
  AttentionProblem problem = GoodProblem();
  problem.options.method = Method::kFlexPrefill;
  problem.shape.sequences = {{256, 256}, {257, 257}};
  const AttentionGeometry g = MakeGeometry(problem);
  EXPECT_TRUE(g.sequences[0].dense);
  EXPECT_FALSE(g.sequences[1].dense);
}

}  // namespace
}  // namespace pbs
