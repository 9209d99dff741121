// Spec: kernels/synthetic/synthetic.h. Statistics of the generator, fixed seeds.
#include "kernels/synthetic/synthetic.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels/synthetic/normal.h"

namespace pbs {
namespace {

struct Tensors {
  SyntheticShape shape;
  std::vector<float> q, k, v;

  const float* Q(int32_t head, int32_t row) const { return Row(q, head, row); }
  const float* K(int32_t head, int32_t row) const { return Row(k, head, row); }
  const float* Row(const std::vector<float>& t, int32_t head, int32_t row) const {
    return t.data() +
           (static_cast<int64_t>(head) * shape.seq_len + row) * shape.head_dim;
  }
  // Logit of query row i of head 0 and key row j of KV head 0.
  double Logit(int32_t head, int32_t i, int32_t j) const {
    const float* a = Q(head, i);
    return std::inner_product(a, a + shape.head_dim, K(0, j), 0.0) /
           std::sqrt(static_cast<double>(shape.head_dim));
  }
  std::vector<double> Logits(int32_t head, int32_t i) const {
    std::vector<double> row;
    for (int32_t j = 0; j < shape.seq_len; ++j) row.push_back(Logit(head, i, j));
    return row;
  }
};

constexpr SyntheticShape kShape = {
    .num_heads = 2, .num_kv_heads = 1, .seq_len = 2048, .head_dim = 64};

Tensors Empty(const SyntheticShape& shape) {
  const size_t row = static_cast<size_t>(shape.seq_len) * shape.head_dim;
  return {shape, std::vector<float>(row * shape.num_heads),
          std::vector<float>(row * shape.num_kv_heads),
          std::vector<float>(row * shape.num_kv_heads)};
}

SyntheticTargets TargetsOf(Tensors& t) {
  return {DType::kF32, t.q.data(), t.k.data(), t.v.data()};
}

Tensors Structured(const SyntheticSetting& setting, uint64_t seed = 1,
                   int32_t sequence = 0) {
  Tensors t = Empty(kShape);
  EXPECT_TRUE(
      GenerateStructured(kShape, setting, seed, sequence, TargetsOf(t), nullptr).ok());
  return t;
}

template <class T>
double Mean(const std::vector<T>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}
template <class T>
double Deviation(const std::vector<T>& x) {
  const double mean = Mean(x);
  double sum = 0;
  for (T value : x) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / static_cast<double>(x.size()));
}
double Correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const double mean_a = Mean(a), mean_b = Mean(b);
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - mean_a) * (b[i] - mean_b);
  return sum / static_cast<double>(a.size()) / Deviation(a) / Deviation(b);
}

// Everything off; tests switch on what they look at.
SyntheticSetting Nothing() {
  SyntheticSetting s;
  s.sigma_token = s.sigma_segment = s.sink = s.topic = s.local = s.noise = s.jitter = 0;
  return s;
}

TEST(NormalSourceSpec, HasTheMomentsAndTheTailOfAStandardNormal) {
  NormalSource source(7);
  constexpr int kCount = 1'000'000;
  double sum = 0, squares = 0, fourth = 0;
  int beyond_2 = 0, beyond_4 = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = source.Normal();
    sum += x;
    squares += x * x;
    fourth += x * x * x * x;
    beyond_2 += std::abs(x) > 2;
    beyond_4 += std::abs(x) > 4;
  }
  // Five standard errors of each estimate.
  EXPECT_NEAR(sum / kCount, 0, 5e-3);
  EXPECT_NEAR(squares / kCount, 1, 8e-3);
  EXPECT_NEAR(fourth / kCount, 3, 5e-2);
  EXPECT_NEAR(beyond_2, 45'500, 1'050);
  EXPECT_NEAR(beyond_4, 63, 40);
}

TEST(WhiteNoiseSpec, LogitsAreStandardNormalAndQueriesDoNotAgree) {
  Tensors t = Empty(kShape);
  ASSERT_TRUE(GenerateWhiteNoise(kShape, 3, 0, TargetsOf(t), nullptr).ok());
  EXPECT_NEAR(Mean(t.q), 0, 0.01);
  EXPECT_NEAR(Deviation(t.k), 1, 0.01);
  EXPECT_NEAR(Deviation(t.v), 1, 0.01);
  EXPECT_NEAR(Deviation(t.Logits(0, 100)), 1, 0.15);
  EXPECT_NEAR(Correlation(t.Logits(0, 100), t.Logits(0, 101)), 0, 0.5);
}

TEST(StructuredSpec, QueriesAgreeOnTheImportanceOfKeys) {
  SyntheticSetting setting = Nothing();
  setting.sigma_token = 3;
  const Tensors t = Structured(setting);
  const std::vector<double> first = t.Logits(0, 1800), other_head = t.Logits(1, 2000);
  EXPECT_GT(Deviation(first), 3 * 0.8 * 0.85);  // gain and rotation at their least
  EXPECT_LT(Deviation(first), 3 * 1.2 * 1.15);
  EXPECT_GT(Correlation(first, other_head), 0.9);
}

TEST(StructuredSpec, RhoTakesTheAgreementAway) {
  SyntheticSetting setting = Nothing();
  setting.sigma_token = 3;
  setting.rho = 0;
  const Tensors t = Structured(setting);
  double agreement = 0;
  for (int32_t i = 0; i < 8; ++i) {  // a sign per topic and head: +-1
    agreement += std::abs(Correlation(t.Logits(0, 200 * i), t.Logits(1, 200 * i)));
  }
  EXPECT_GT(agreement / 8, 0.5);
  EXPECT_GT(Deviation(t.Logits(0, 0)), 2);
}

TEST(StructuredSpec, SinksStandOut) {
  SyntheticSetting setting = Nothing();
  setting.sink = 6;
  const Tensors t = Structured(setting);
  const std::vector<double> logits = t.Logits(0, 500);
  for (int32_t j = 0; j < 4; ++j) EXPECT_NEAR(logits[j], 6, 1.8) << "key " << j;
  EXPECT_NEAR(logits[4], 0, 1e-3);
}

TEST(StructuredSpec, LocalityPeaksAtTheOwnPosition) {
  SyntheticSetting setting = Nothing();
  setting.local = 2;
  const Tensors t = Structured(setting);
  const double own = t.Logit(0, 1000, 1000);
  EXPECT_NEAR(own, 4, 1.0);
  EXPECT_LT(t.Logit(0, 1000, 100), 0.8 * own);
  EXPECT_LT(t.Logit(0, 1000, 1900), 0.8 * own);
}

TEST(StructuredSpec, KeysOfTheQuerysTopicGainTheTopicsStrength) {
  SyntheticSetting setting = Nothing();
  setting.topic = 2;
  setting.piece = 50;
  const Tensors t = Structured(setting);
  const std::vector<double> logits = t.Logits(0, 1500);
  int high = 0, low = 0;
  for (double logit : logits) {
    high += std::abs(logit - 2) < 0.7;
    low += std::abs(logit) < 0.7;
  }
  EXPECT_EQ(high + low, kShape.seq_len);
  EXPECT_GT(high, kShape.seq_len / 20);  // one topic of six
  EXPECT_LT(high, kShape.seq_len / 2);
}

TEST(StructuredSpec, SegmentImportanceIsSlow) {
  SyntheticSetting setting = Nothing();
  setting.sigma_segment = 2;
  const Tensors t = Structured(setting);
  const std::vector<double> logits = t.Logits(0, 1000);
  std::vector<double> step;
  for (size_t j = 1; j < logits.size(); ++j) step.push_back(logits[j] - logits[j - 1]);
  EXPECT_LT(Deviation(step), 0.2);
  EXPECT_GT(Deviation(logits), 0.5);
}

TEST(StructuredSpec, SeedAndSequenceNameTheTensors) {
  const SyntheticSetting setting;
  const Tensors first = Structured(setting, 1, 0);
  EXPECT_EQ(first.k, Structured(setting, 1, 0).k);
  EXPECT_NE(first.k, Structured(setting, 2, 0).k);
  EXPECT_NE(first.k, Structured(setting, 1, 1).k);
  EXPECT_NE(first.q, Structured(setting, 1, 1).q);
}

TEST(StructuredSpec, HalfPrecisionIsTheRoundedF32) {
  const SyntheticSetting setting;
  const Tensors wide = Structured(setting);
  std::vector<bf16> q(wide.q.size()), k(wide.k.size()), v(wide.v.size());
  const SyntheticTargets targets = {DType::kBF16, q.data(), k.data(), v.data()};
  ASSERT_TRUE(GenerateStructured(kShape, setting, 1, 0, targets, nullptr).ok());
  for (size_t i = 0; i < q.size(); ++i) ASSERT_EQ(q[i].bits, ToBf16(wide.q[i]).bits);
  for (size_t i = 0; i < v.size(); ++i) ASSERT_EQ(v[i].bits, ToBf16(wide.v[i]).bits);
}

TEST(StructuredSpec, EveryHeadWidthAndLengthIsFinite) {
  for (int32_t head_dim : {32, 64, 96, 128, 256}) {
    for (int32_t seq_len : {1, 2, 300}) {
      const SyntheticShape shape = {4, 2, seq_len, head_dim};
      Tensors t = Empty(shape);
      ASSERT_TRUE(GenerateStructured(shape, {}, 1, 0, TargetsOf(t), nullptr).ok());
      for (float value : t.q) ASSERT_TRUE(std::isfinite(value));
      for (float value : t.k) ASSERT_TRUE(std::isfinite(value));
    }
  }
}

TEST(SyntheticSpec, StopsWhenToldTo) {
  Tensors t = Empty(kShape);
  const std::atomic<bool> stop = true;
  EXPECT_EQ(GenerateStructured(kShape, {}, 1, 0, TargetsOf(t), &stop).code(),
            StatusCode::kCancelled);
  EXPECT_EQ(GenerateWhiteNoise(kShape, 1, 0, TargetsOf(t), &stop).code(),
            StatusCode::kCancelled);
}

}  // namespace
}  // namespace pbs
