// Spec: server/engine/cost_model.h.
#include "server/engine/cost_model.h"

#include <gtest/gtest.h>
#include <optional>

namespace pbs::server {
namespace {

// A machine with exact rates: seconds per token and per squared token.
constexpr double kLinear = 2e-4;
constexpr double kQuadratic = 1e-8;

Work Units(double tokens) { return {tokens, tokens * tokens}; }
Work Seconds(double tokens) { return {kLinear * tokens, kQuadratic * tokens * tokens}; }
double Total(double tokens) {
  return Seconds(tokens).linear + Seconds(tokens).quadratic;
}

class CostModelSpec : public testing::Test {
 protected:
  void Measure(double tokens) {
    model_.Measure(key_, Units(tokens), Seconds(tokens), now_);
  }
  double Predict(double tokens) const {
    return model_.Predict(key_, Units(tokens), now_)->seconds;
  }

  const CostKey key_ = {.method = Method::kPbs, .dtype = DType::kF32, .head_dim = 64};
  absl::Time now_ = absl::FromUnixSeconds(1000);
  CostModel model_;
};

TEST_F(CostModelSpec, KnowsNothingBeforeAMeasurement) {
  EXPECT_EQ(model_.Predict(key_, Units(10), now_), std::nullopt);
}

TEST_F(CostModelSpec, OneMeasurementGivesBothRates) {
  Measure(1000);
  EXPECT_NEAR(Predict(1000), Total(1000), 1e-9);
  EXPECT_NEAR(Predict(3000), Total(3000), 1e-9);
  EXPECT_NEAR(Predict(10), Total(10), 1e-9);
}

TEST_F(CostModelSpec, OtherKeysStayUnknown) {
  Measure(1000);
  CostKey other = key_;
  other.method = Method::kDense;
  EXPECT_EQ(model_.Predict(other, Units(10), now_), std::nullopt);
}

TEST_F(CostModelSpec, FarBeyondWhatWasMeasuredItIsALowerBound) {
  Measure(100);
  EXPECT_NEAR(Predict(400), Total(400), 1e-9);
  EXPECT_NEAR(Predict(1'000'000), Total(400), 1e-9);
}

TEST_F(CostModelSpec, FixedCostsOfSmallRequestsDoNotMisleadAboutLargeOnes) {
  Measure(10'000);
  for (int i = 0; i < 1000; ++i) {
    model_.Measure(key_, Units(1), {0.01, 0.001}, now_);  // fifty times the rates
  }
  EXPECT_NEAR(Predict(10'000), Total(10'000), 0.05 * Total(10'000));
}

TEST_F(CostModelSpec, FollowsAMachineThatBecameSlower) {
  Measure(10'000);
  for (int i = 0; i < 300; ++i) {
    const Work slow = {3 * Seconds(10'000).linear, 3 * Seconds(10'000).quadratic};
    model_.Measure(key_, Units(10'000), slow, now_);
  }
  EXPECT_NEAR(Predict(10'000), 3 * Total(10'000), 0.1 * Total(10'000));
}

TEST_F(CostModelSpec, GrowsStaleSoThatARefusalCannotFeedItself) {
  Measure(1000);
  EXPECT_TRUE(model_.Predict(key_, Units(1), now_ + CostModel::kFreshTime)->fresh);
  const absl::Time later = now_ + CostModel::kFreshTime + absl::Nanoseconds(1);
  EXPECT_FALSE(model_.Predict(key_, Units(1), later)->fresh);
  model_.Measure(key_, Units(1000), Seconds(1000), later);
  EXPECT_TRUE(model_.Predict(key_, Units(1), later)->fresh);
}

TEST_F(CostModelSpec, WorkWithoutALinearPartIsPredictedByTheOther) {
  model_.Measure(key_, {0, 1000}, {0, 0.5}, now_);
  EXPECT_NEAR(model_.Predict(key_, {0, 2000}, now_)->seconds, 1.0, 1e-9);
}

// Thresholds of 0.5 and 0.9 were measured; time per token differs by ten.
class CostModelRungSpec : public CostModelSpec {
 protected:
  CostKey KeyOf(float rung) const {
    CostKey key = key_;
    key.rung = rung;
    return key;
  }
  void MeasureRung(float rung, double seconds) {
    model_.Measure(KeyOf(rung), {1000, 0}, {seconds, 0}, now_);
  }
  std::optional<Prediction> PredictRung(float rung) const {
    return model_.Predict(KeyOf(rung), {1000, 0}, now_);
  }
};

TEST_F(CostModelRungSpec, ARungThatWasMeasuredIsItsOwn) {
  MeasureRung(0.5f, 1);
  MeasureRung(0.9f, 10);
  EXPECT_NEAR(PredictRung(0.5f)->seconds, 1, 1e-9);
  EXPECT_NEAR(PredictRung(0.9f)->seconds, 10, 1e-9);
  EXPECT_TRUE(PredictRung(0.9f)->fresh);
}

TEST_F(CostModelRungSpec, ARungBetweenIsOnTheLineOfItsNeighbours) {
  MeasureRung(0.5f, 1);
  MeasureRung(0.9f, 10);
  MeasureRung(1.0f, 100);
  EXPECT_NEAR(PredictRung(0.7f)->seconds, 5.5, 1e-5);
  EXPECT_FALSE(PredictRung(0.7f)->fresh);
}

TEST_F(CostModelRungSpec, ARungBesideIsItsNearestNeighbour) {
  MeasureRung(0.5f, 1);
  MeasureRung(0.9f, 10);
  EXPECT_NEAR(PredictRung(0.1f)->seconds, 1, 1e-9);
  EXPECT_NEAR(PredictRung(1.0f)->seconds, 10, 1e-9);
  EXPECT_FALSE(PredictRung(0.1f)->fresh);
}

TEST_F(CostModelRungSpec, RungsOfOtherKeysDoNotCount) {
  MeasureRung(0.5f, 1);
  CostKey other = KeyOf(0.7f);
  other.method = Method::kPrism;
  EXPECT_EQ(model_.Predict(other, Units(10), now_), std::nullopt);
}

}  // namespace
}  // namespace pbs::server
