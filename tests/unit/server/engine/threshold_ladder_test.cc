// Spec: server/engine/threshold_ladder.h.
#include "server/engine/threshold_ladder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace pbs::server {
namespace {

using testing::ElementsAre;

TEST(ThresholdLadderSpec, TheRungOfAThresholdIsTheLowestThatIsNotBelowIt) {
  EXPECT_EQ(RungOf(1), 1);
  EXPECT_EQ(RungOf(0.9f), 0.9f);
  EXPECT_EQ(RungOf(0.91f), 0.95f);
  EXPECT_EQ(RungOf(0.55f), 0.6f);
  EXPECT_EQ(RungOf(0.001f), 0.1f);
}

TEST(ThresholdLadderSpec, WhatFitsAsAskedStays) {
  EXPECT_EQ(HighestThatFits(0.93f, 0.5f, [](float) { return true; }), 0.93f);
}

TEST(ThresholdLadderSpec, TheHighestRungThatFitsIsTaken) {
  std::vector<float> tried;
  const auto fits = [&](float threshold) {
    tried.push_back(threshold);
    return threshold <= 0.82f;
  };
  EXPECT_EQ(HighestThatFits(0.93f, 0.5f, fits), 0.8f);
  EXPECT_THAT(tried, ElementsAre(0.93f, 0.9f, 0.85f, 0.8f));
}

TEST(ThresholdLadderSpec, WhereNothingFitsTheLowestIsTaken) {
  std::vector<float> tried;
  const auto fits = [&](float threshold) {
    tried.push_back(threshold);
    return false;
  };
  EXPECT_EQ(HighestThatFits(0.9f, 0.75f, fits), 0.75f);
  EXPECT_THAT(tried, ElementsAre(0.9f, 0.85f, 0.8f));
}

TEST(ThresholdLadderSpec, ALowestThatIsAskedForIsTakenAtOnce) {
  EXPECT_EQ(HighestThatFits(0.9f, 0.9f, [](float) { return false; }), 0.9f);
}

}  // namespace
}  // namespace pbs::server
