// Spec: kernels/include/pbs/block_lists.h and block_mask.h.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "pbs/block_mask.h"
#include "tests/support/case_name.h"

namespace pbs {
namespace {

AttentionProblem SmallProblem(int32_t num_blocks, int32_t blocks_per_segment) {
  AttentionProblem problem;
  problem.shape = {.num_heads = 1,
                   .num_kv_heads = 1,
                   .head_dim = 32,
                   .sequences = {{num_blocks * 16, num_blocks * 16}}};
  problem.options.block_size = 16;
  problem.options.segment_size = 16 * blocks_per_segment;
  return problem;
}

// Every mask of up to 4 blocks: 2^(n*n) masks.
TEST(BlockMaskSpec, EveryMaskOfUpToFourBlocksSurvivesTheTripThroughLists) {
  for (int32_t n = 1; n <= 4; ++n) {
    const AttentionGeometry g = MakeGeometry(SmallProblem(n, 1));
    std::vector<uint8_t> mask(static_cast<size_t>(n) * n);
    for (uint32_t bits = 0; bits < (1u << (n * n)); ++bits) {
      for (size_t i = 0; i < mask.size(); ++i) mask[i] = (bits >> i) & 1;
      const auto lists = ListsFromMask(g, mask);
      ASSERT_TRUE(lists.ok());
      ASSERT_EQ(ExpandMask(g, lists->View()), mask)
          << "blocks " << n << " bits " << bits;
    }
  }
}

TEST(BlockMaskSpec, MaskedEntriesAreThoseOfTheOwnSegment) {
  const AttentionGeometry g = MakeGeometry(SmallProblem(4, 2));
  const std::vector<uint8_t> mask = {1, 1, 0, 0,  //
                                     1, 1, 0, 0,  //
                                     1, 0, 1, 1,  //
                                     0, 0, 0, 1};
  const auto lists = ListsFromMask(g, mask);
  ASSERT_TRUE(lists.ok());
  EXPECT_EQ(lists->num_masked, (std::vector<uint16_t>{2, 2, 2, 1}));
}

TEST(BlockMaskSpec, BatchWithOffsetAndEmptySequenceKeepsRowsApart) {
  AttentionProblem problem = SmallProblem(1, 1);
  problem.shape.num_heads = 2;
  problem.shape.sequences = {{16, 48}, {0, 0}, {33, 33}};
  const AttentionGeometry g = MakeGeometry(problem);
  EXPECT_EQ(MaskBytes(g), 2 * (1 * 3) + 0 + 2 * (3 * 3));
  const BlockLists causal = CausalLists(g);
  EXPECT_EQ(causal.count, (std::vector<uint16_t>{3, 3, 1, 2, 3, 1, 2, 3}));
  const auto back = ListsFromMask(g, ExpandMask(g, causal.View()));
  ASSERT_TRUE(back.ok());
  EXPECT_EQ(back->indices, causal.indices);
}

TEST(BlockMaskSpec, RefusesAWrongSizeAndAByteThatIsNoBit) {
  const AttentionGeometry g = MakeGeometry(SmallProblem(2, 1));
  EXPECT_EQ(ListsFromMask(g, std::vector<uint8_t>(3)).status().message(),
            "block_mask has 3 bytes; heads x query blocks x key blocks are 4");
  EXPECT_EQ(ListsFromMask(g, std::vector<uint8_t>{1, 0, 2, 1}).status().message(),
            "block_mask holds 2 at byte 2; only 0 and 1 are valid");
}

struct ListCase {
  const char* name;
  std::vector<uint8_t> mask;  // 4 blocks, segments of 2
  const char* message;        // "" when accepted
};

class ValidateListsSpec : public testing::TestWithParam<ListCase> {};

TEST_P(ValidateListsSpec, AcceptsExactlyTheReadableMasks) {
  const AttentionGeometry g = MakeGeometry(SmallProblem(4, 2));
  const auto lists = ListsFromMask(g, GetParam().mask);
  ASSERT_TRUE(lists.ok());
  std::vector<int32_t> identity(64);
  std::iota(identity.begin(), identity.end(), 0);
  const Status status =
      ValidateLists(g, {identity.data(), PackedLayout(64, 1)}, lists->View());
  EXPECT_EQ(status.message(), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ValidateListsSpec,
    testing::Values(
        ListCase{
            "own_blocks_only", {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, ""},
        ListCase{"upper_block_of_own_segment",
                 {1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1},
                 ""},
        ListCase{"block_of_a_later_segment",
                 {1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1},
                 "block list of sequence 0, head 0, query block 0 holds block 2; only "
                 "blocks below 2 (the end of its own segment) can be read"},
        ListCase{
            "own_position_missing",
            {1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1},
            "block list of sequence 0, head 0, query block 1 misses block 1, which "
            "holds the key of position 16: every query must reach its own "
            "position"}),
    testing_support::CaseName());

TEST(ValidateListsSpec, RefusesUnsortedRowsAndAWrongRowCount) {
  const AttentionGeometry g = MakeGeometry(SmallProblem(2, 2));
  BlockLists lists = {{0, 2}, {2, 2}, {2, 2}, {1, 0, 0, 1}};
  EXPECT_EQ(
      ValidateLists(g, {}, lists.View()).message(),
      "block list of sequence 0, head 0, query block 0 is not strictly ascending: "
      "1 before 0");
  lists.count.pop_back();
  EXPECT_EQ(ValidateLists(g, {}, lists.View()).message(),
            "block lists have 1 rows; heads x query blocks are 2");
}

TEST(ValidateListsSpec, FollowsAGivenOrderToTheBlockOfEachPosition) {
  const AttentionGeometry g = MakeGeometry(SmallProblem(2, 2));
  std::vector<int32_t> swapped(32);
  std::iota(swapped.begin(), swapped.begin() + 16, 16);
  std::iota(swapped.begin() + 16, swapped.end(), 0);
  const ConstRows order = {swapped.data(), PackedLayout(32, 1)};
  EXPECT_TRUE(ValidateOrder(g, order).ok());
  const auto diagonal = ListsFromMask(g, std::vector<uint8_t>{1, 0, 0, 1});
  EXPECT_EQ(ValidateLists(g, {}, diagonal->View()).message(),
            "block list of sequence 0, head 0, query block 0 misses block 1 of its own "
            "segment, and no order says where its queries' own keys lie");
  const auto full = ListsFromMask(g, std::vector<uint8_t>{1, 1, 1, 1});
  EXPECT_TRUE(ValidateLists(g, {}, full->View()).ok());
  EXPECT_FALSE(ValidateLists(g, order, diagonal->View()).ok());
  const auto anti = ListsFromMask(g, std::vector<uint8_t>{0, 1, 1, 0});
  EXPECT_TRUE(ValidateLists(g, order, anti->View()).ok());
}

struct OrderCase {
  const char* name;
  int32_t slot;
  int32_t key;
  bool accepted;
};

class ValidateOrderSpec : public testing::TestWithParam<OrderCase> {};

// 40 keys, segments of 16: two whole segments and a tail of 8.
TEST_P(ValidateOrderSpec, AcceptsOnlyPermutationsInsideSegments) {
  AttentionProblem problem = SmallProblem(3, 1);
  problem.shape.sequences = {{40, 40}};
  const AttentionGeometry g = MakeGeometry(problem);
  std::vector<int32_t> order(40);
  std::iota(order.begin(), order.end(), 0);
  std::swap(order[GetParam().slot], order[GetParam().key % 40]);
  if (GetParam().key >= 40 || GetParam().key < 0)
    order[GetParam().slot] = GetParam().key;
  const Status status = ValidateOrder(g, {order.data(), PackedLayout(40, 1)});
  EXPECT_EQ(status.ok(), GetParam().accepted) << status.message();
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ValidateOrderSpec,
    testing::Values(OrderCase{"identity", 3, 3, true},
                    OrderCase{"swap_inside_a_segment", 3, 9, true},
                    OrderCase{"swap_across_segments", 3, 17, false},
                    OrderCase{"swap_in_the_tail", 33, 35, false},
                    OrderCase{"past_the_end", 3, 40, false},
                    OrderCase{"repeat_past_the_end", 3, 84, false}),
    testing_support::CaseName());

TEST(ValidateOrderSpec, RefusesARepeatedKeyByNamingItsSlot) {
  const AttentionGeometry g = MakeGeometry(SmallProblem(1, 1));
  std::vector<int32_t> order(16);
  std::iota(order.begin(), order.end(), 0);
  order[5] = 4;
  EXPECT_EQ(ValidateOrder(g, {order.data(), PackedLayout(16, 1)}).message(),
            "order of sequence 0, head 0 holds 4 in slot 5; it must be a permutation "
            "inside each segment of 16 keys and leave the keys behind the last one in "
            "place");
}

}  // namespace
}  // namespace pbs
