// Spec: docs/KERNELS.md, sections 2 and 3.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "methods/block_selection.h"
#include "methods/key_order.h"
#include "tests/support/case_name.h"

namespace pbs {
namespace {

std::vector<int32_t> SortedOrder(const std::vector<float>& importance, int32_t k_len,
                                 int32_t segment_size) {
  std::vector<int32_t> order(static_cast<size_t>(k_len), -1);
  std::vector<uint64_t> scratch(static_cast<size_t>(segment_size));
  SortSegments(importance, segment_size, scratch, order);
  return order;
}

TEST(SortSegmentsSpec, PutsImportantKeysFirstAndLowerPositionsFirstOnTies) {
  EXPECT_EQ(SortedOrder({.1f, .4f, .4f, .2f}, 4, 4),
            (std::vector<int32_t>{1, 2, 3, 0}));
  EXPECT_EQ(SortedOrder({0, 0, 0, 0}, 4, 4), (std::vector<int32_t>{0, 1, 2, 3}));
}

TEST(SortSegmentsSpec, LeavesTheTailBehindTheLastWholeSegmentInPlace) {
  EXPECT_EQ(SortedOrder({.1f, .2f, .1f, .3f}, 7, 2),
            (std::vector<int32_t>{1, 0, 3, 2, 4, 5, 6}));
  EXPECT_EQ(SortedOrder({}, 3, 4), (std::vector<int32_t>{0, 1, 2}));
}

struct SegmentCase {
  const char* name;
  int32_t k_len;
  int32_t segment_size;
};

class SegmentOrderSpec : public testing::TestWithParam<SegmentCase> {};

TEST_P(SegmentOrderSpec, NeverMovesAKeyAcrossASegmentBoundary) {
  const auto [name, k_len, segment_size] = GetParam();
  for (uint32_t seed = 0; seed < 32; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed=" << seed);
    std::mt19937 random(seed);
    std::vector<float> importance(
        static_cast<size_t>(k_len / segment_size * segment_size));
    for (float& x : importance) x = static_cast<float>(random() % 50);
    const auto order = SortedOrder(importance, k_len, segment_size);
    std::vector<bool> seen(static_cast<size_t>(k_len), false);
    for (int32_t slot = 0; slot < k_len; ++slot) {
      ASSERT_EQ(order[slot] / segment_size, slot / segment_size);
      ASSERT_FALSE(seen[order[slot]]) << "slot " << slot << " repeats a key";
      seen[order[slot]] = true;
      const bool inside =
          slot % segment_size != 0 && slot < static_cast<int32_t>(importance.size());
      if (inside) {
        ASSERT_GE(importance[order[slot - 1]], importance[order[slot]]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, SegmentOrderSpec,
                         testing::Values(SegmentCase{"one_key", 1, 256},
                                         SegmentCase{"one_segment", 256, 256},
                                         SegmentCase{"segment_and_one", 257, 256},
                                         SegmentCase{"odd", 1000, 96}),
                         testing_support::CaseName());

struct SelectionCase {
  const char* name;
  SelectionRow row;
  std::vector<float> logits;
  std::vector<uint16_t> list;
};

class SelectRowSpec : public testing::TestWithParam<SelectionCase> {};

TEST_P(SelectRowSpec, TakesTheFewestLargestCandidatesThatReachTheThreshold) {
  const SelectionCase& c = GetParam();
  std::vector<uint64_t> scratch(c.logits.size());
  std::vector<uint16_t> list(64);
  const auto selected = SelectRow(c.row, c.logits, scratch, list.data());
  ASSERT_TRUE(selected.has_value());
  list.resize(static_cast<size_t>(selected->count));
  EXPECT_EQ(list, c.list);
  EXPECT_EQ(selected->num_masked, c.row.own_end - c.row.own_begin);
}

SelectionRow PastRow(int32_t own_begin, int32_t own_end, int32_t forced,
                     float threshold) {
  return {.num_candidates = own_begin,
          .own_begin = own_begin,
          .own_end = own_end,
          .forced_block = forced,
          .threshold = threshold};
}

INSTANTIATE_TEST_SUITE_P(
    Cases, SelectRowSpec,
    testing::Values(
        SelectionCase{"no_past", PastRow(0, 2, -1, .9f), {}, {0, 1}},
        SelectionCase{
            "one_block_dominates", PastRow(3, 5, -1, .9f), {0, 9, 0}, {1, 3, 4}},
        SelectionCase{"crossing_block_is_kept",
                      PastRow(4, 6, -1, .5f),
                      {0, 0, 0, 0},
                      {0, 1, 4, 5}},
        SelectionCase{
            "ties_go_to_the_lower_block", PastRow(4, 5, -1, .3f), {0, 1, 1, 0}, {1, 4}},
        SelectionCase{"threshold_one_takes_all",
                      PastRow(3, 4, -1, 1.f),
                      {-80, 0, 80},
                      {0, 1, 2, 3}},
        SelectionCase{
            "forced_block_joins", PastRow(4, 6, 0, .5f), {0, 0, 9, 0}, {0, 2, 4, 5}},
        SelectionCase{"forced_block_already_selected",
                      PastRow(4, 6, 2, .5f),
                      {0, 0, 9, 0},
                      {2, 4, 5}},
        SelectionCase{"forced_block_inside_own_segment",
                      PastRow(2, 4, 3, .5f),
                      {9, 0},
                      {0, 2, 3}},
        SelectionCase{"mass_that_never_reaches_takes_all",
                      PastRow(3, 4, -1, .99999999f),
                      {0, 0, 0},
                      {0, 1, 2, 3}},
        SelectionCase{"diagonal_takes_its_share_in_mean_pooling",
                      {.num_candidates = 3,
                       .own_begin = 2,
                       .own_end = 3,
                       .forced_block = 0,
                       .threshold = .9f},
                      {0, 0, 9},
                      {0, 2}}),
    testing_support::CaseName());

TEST(SelectRowErrors, RefusesLogitsThatAreNotFinite) {
  std::vector<uint64_t> scratch(2);
  std::vector<uint16_t> list(3);
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    const float logits[] = {0.0f, bad};
    EXPECT_FALSE(SelectRow(PastRow(2, 3, -1, .9f), logits, scratch, list.data()));
  }
}

}  // namespace
}  // namespace pbs
