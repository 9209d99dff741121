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
#include "methods/vertical_slash.h"
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

// One query block: its own segment [own_begin, own_end) and what is forced before it.
struct SelectionCase {
  const char* name;
  float threshold;
  std::vector<float> logits;
  ForcedBlocks forced;
  std::vector<uint16_t> list;
};

class KeepCoverSpec : public testing::TestWithParam<SelectionCase> {};

TEST_P(KeepCoverSpec, TakesTheFewestLargestCandidatesThatReachTheThreshold) {
  const SelectionCase& c = GetParam();
  std::vector<uint64_t> scratch(c.logits.size());
  std::vector<uint8_t> keep(64);
  ASSERT_TRUE(KeepCover(c.threshold, c.logits, scratch, keep));
  KeepForced(c.forced, keep);
  std::vector<uint16_t> list(64);
  list.resize(static_cast<size_t>(WriteList(c.forced, keep, list.data())));
  EXPECT_EQ(list, c.list);
}

ForcedBlocks Own(int32_t own_begin, int32_t own_end, int32_t first_block = -1) {
  return {.own_begin = own_begin,
          .own_end = own_end,
          .first_block = first_block,
          .window_begin = own_begin};
}

INSTANTIATE_TEST_SUITE_P(
    Cases, KeepCoverSpec,
    testing::Values(
        SelectionCase{"no_past", .9f, {}, Own(0, 2), {0, 1}},
        SelectionCase{"one_block_dominates", .9f, {0, 9, 0}, Own(3, 5), {1, 3, 4}},
        SelectionCase{
            "crossing_block_is_kept", .5f, {0, 0, 0, 0}, Own(4, 6), {0, 1, 4, 5}},
        SelectionCase{
            "ties_go_to_the_lower_block", .3f, {0, 1, 1, 0}, Own(4, 5), {1, 4}},
        SelectionCase{
            "threshold_one_takes_all", 1.f, {-80, 0, 80}, Own(3, 4), {0, 1, 2, 3}},
        SelectionCase{
            "forced_block_joins", .5f, {0, 0, 9, 0}, Own(4, 6, 0), {0, 2, 4, 5}},
        SelectionCase{"forced_block_already_selected",
                      .5f,
                      {0, 0, 9, 0},
                      Own(4, 6, 2),
                      {2, 4, 5}},
        SelectionCase{
            "forced_block_inside_own_segment", .5f, {9, 0}, Own(2, 4, 3), {0, 2, 3}},
        SelectionCase{"mass_that_never_reaches_takes_all",
                      .99999999f,
                      {0, 0, 0},
                      Own(3, 4),
                      {0, 1, 2, 3}},
        SelectionCase{"diagonal_takes_its_share_in_mean_pooling",
                      .9f,
                      {0, 0, 9},
                      Own(2, 3, 0),
                      {0, 2}}),
    testing_support::CaseName());

TEST(KeepCoverErrors, RefusesLogitsThatAreNotFinite) {
  std::vector<uint64_t> scratch(2);
  std::vector<uint8_t> keep(2);
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    const float logits[] = {0.0f, bad};
    for (float threshold : {0.9f, 1.0f}) {
      EXPECT_FALSE(KeepCover(threshold, logits, scratch, keep));
    }
  }
}

struct ForcedMassCase {
  const char* name;
  float threshold;
  ForcedMass forced;
  std::vector<float> masses;
  std::vector<uint8_t> keep;
};

class KeepCoverWithForcedSpec : public testing::TestWithParam<ForcedMassCase> {};

TEST_P(KeepCoverWithForcedSpec, TakesOthersWhileTheMassBeforeIsTooSmall) {
  const ForcedMassCase& c = GetParam();
  std::vector<uint64_t> scratch(c.masses.size());
  std::vector<uint8_t> keep(c.masses.size());
  KeepCoverWithForced(c.threshold, c.forced, c.masses, scratch, keep);
  EXPECT_EQ(keep, c.keep);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, KeepCoverWithForcedSpec,
    testing::Values(
        ForcedMassCase{"forced_blocks_reach", .5f, {3, 0}, {4, 1, 1, 4}, {1, 0, 0, 1}},
        ForcedMassCase{
            "crossing_block_is_kept", .6f, {3, 0}, {1, 2, 5, 2}, {1, 0, 1, 1}},
        ForcedMassCase{
            "ties_go_to_the_lower_block", .4f, {3, 0}, {1, 3, 3, 1}, {1, 1, 0, 1}},
        ForcedMassCase{"own_is_first", .5f, {0, 0}, {8}, {1}},
        ForcedMassCase{"nothing_forced", .5f, {-1, -1}, {1, 6, 1}, {0, 1, 0}},
        ForcedMassCase{"threshold_one_takes_all", 1.f, {2, 0}, {9, 0, 0}, {1, 1, 1}},
        ForcedMassCase{"no_mass_takes_forced_only", .9f, {2, 0}, {0, 0, 0}, {1, 0, 1}},
        // As published: the largest other always, and each next one is judged by the
        // mass without the one before.
        ForcedMassCase{
            "lagging_takes_two", .5f, {3, 0, true}, {1, 5, 1, 3}, {1, 1, 0, 1}},
        ForcedMassCase{"lagging_takes_the_largest_when_own_reaches",
                       .5f,
                       {3, 0, true},
                       {0, 1, 1, 8},
                       {1, 1, 0, 1}},
        ForcedMassCase{
            "lagging_ranks_the_first", .5f, {3, 0, true}, {6, 1, 1, 2}, {1, 1, 0, 1}}),
    testing_support::CaseName());

TEST(KeepShareOfLargestSpec, KeepsEqualShares) {
  std::vector<uint8_t> keep(4);
  KeepShareOfLargest(0.5f, std::vector<float>{1, 4, 2, 1.9f}, keep);
  EXPECT_EQ(keep, (std::vector<uint8_t>{0, 1, 1, 0}));
  KeepShareOfLargest(1.0f, std::vector<float>{0, 0, 0, 0}, keep);  // all are largest
  EXPECT_EQ(keep, (std::vector<uint8_t>{1, 1, 1, 1}));
}

struct ForcedCase {
  const char* name;
  ForcedBlocks forced;
  std::vector<uint16_t> list;  // nothing is kept by its score
};

class KeepForcedSpec : public testing::TestWithParam<ForcedCase> {};

TEST_P(KeepForcedSpec, AddsBlocksBeforeTheOwnSegment) {
  const ForcedBlocks& forced = GetParam().forced;
  std::vector<uint8_t> keep(static_cast<size_t>(forced.own_begin));
  KeepForced(forced, keep);
  std::vector<uint16_t> list(static_cast<size_t>(forced.own_end));
  list.resize(static_cast<size_t>(WriteList(forced, keep, list.data())));
  EXPECT_EQ(list, GetParam().list);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, KeepForcedSpec,
    testing::Values(ForcedCase{"own_only", {4, 6, -1, 0, 4}, {4, 5}},
                    ForcedCase{"first_block", {4, 6, 1, 0, 4}, {1, 4, 5}},
                    ForcedCase{"sinks", {4, 6, -1, 2, 4}, {0, 1, 4, 5}},
                    ForcedCase{"window", {4, 6, -1, 0, 2}, {2, 3, 4, 5}},
                    ForcedCase{"window_past_the_start", {2, 3, -1, 0, -5}, {0, 1, 2}},
                    ForcedCase{"window_inside_own", {4, 6, -1, 0, 5}, {4, 5}},
                    ForcedCase{"sinks_past_own", {2, 3, -1, 9, 2}, {0, 1, 2}},
                    ForcedCase{"first_block_inside_own", {2, 4, 3, 0, 2}, {2, 3}},
                    ForcedCase{"all_of_them", {6, 7, 3, 1, 5}, {0, 3, 5, 6}}),
    testing_support::CaseName());

struct SpansCase {
  const char* name;
  int32_t position;
  std::vector<int32_t> distances;  // descending
  std::vector<int32_t> bounds;     // begin and end of each span
};

class MakeSpansSpec : public testing::TestWithParam<SpansCase> {};

TEST_P(MakeSpansSpec, CoversTheDistancesOfTheGroupsOf64Positions) {
  const SpansCase& c = GetParam();
  std::vector<KeySpan> spans(static_cast<size_t>(SpansMax(c.position + 1)));
  const int32_t count = MakeSpans(c.distances, c.position, spans.data());
  std::vector<int32_t> bounds;
  for (int32_t i = 0; i < count; ++i) {
    bounds.push_back(spans[i].begin);
    bounds.push_back(spans[i].end);
  }
  EXPECT_EQ(bounds, c.bounds);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, MakeSpansSpec,
    testing::Values(SpansCase{"own_group", 130, {0}, {128, 192}},
                    SpansCase{"last_of_the_group", 191, {0}, {128, 192}},
                    SpansCase{"apart", 130, {70, 0}, {58, 122, 128, 192}},
                    SpansCase{"a_gap_of_64_is_filled", 130, {64, 0}, {64, 192}},
                    SpansCase{"ends_behind_the_group", 130, {60, 0}, {68, 196}},
                    SpansCase{"equal_ends", 5, {30, 2, 0}, {0, 64}},
                    SpansCase{"too_far_for_the_group", 5, {500, 64, 0}, {0, 64}},
                    SpansCase{"as_far_as_the_group", 5, {500, 63, 0}, {0, 64}}),
    testing_support::CaseName());

TEST(ChooseLinesSpec, TakesTheFirstColumnsAndTheNearDistancesFirst) {
  std::vector<float> columns(200, 0.0f);
  std::vector<float> distances(200, 0.0f);
  columns[150] = columns[170] = columns[190] = 0.25f;
  distances[120] = 0.5f;
  distances[110] = 0.125f;
  std::vector<uint64_t> scratch(200);
  std::vector<int32_t> chosen_columns(32);
  std::vector<int32_t> chosen_distances(101);
  ChooseLines(columns, distances, scratch, chosen_columns, chosen_distances);
  std::vector<int32_t> expected_columns(30);
  std::iota(expected_columns.begin(), expected_columns.end(), 0);
  expected_columns.insert(expected_columns.end(), {150, 170});  // of equal ones
  EXPECT_EQ(chosen_columns, expected_columns);
  std::vector<int32_t> expected_distances = {120};
  for (int32_t distance = 99; distance >= 0; --distance) {
    expected_distances.push_back(distance);
  }
  EXPECT_EQ(chosen_distances, expected_distances);
}

}  // namespace
}  // namespace pbs
