// Spec: PrefillProblem::head_thresholds.
#include <gtest/gtest.h>

#include <vector>

#include "tests/unit/model/tiny_prefill.h"

namespace pbs {
namespace {

using namespace tiny_prefill;  // NOLINT

constexpr int32_t kTokens = 300;

AttentionOptions SmallBlocks(float threshold) {
  return {.block_size = 16, .segment_size = 32, .threshold = threshold};
}

class HeadThresholdsSpec : public PrefillRunSpec {
 protected:
  int32_t num_heads() const { return model_->config().num_heads; }

  // The reports of a prefill's layers.
  std::vector<LayerReport> Run(float threshold,
                               const std::vector<float>& head_thresholds) {
    const auto tokens = RandomTokens(kTokens, 3);
    KvCache cache = MakeCache(*model_, kTokens);
    EventLog log;
    const Prefilled result = Prefill(*model_,
                                     {.num_tokens = kTokens,
                                      .attention = SmallBlocks(threshold),
                                      .head_thresholds = head_thresholds},
                                     tokens, cache, &log);
    EXPECT_TRUE(result.status.ok()) << result.status.ToString();
    return log.reports;
  }
};

TEST_F(HeadThresholdsSpec, EveryLayerHasItsOwn) {
  std::vector<float> thresholds;
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (int32_t head = 0; head < num_heads(); ++head) {
      thresholds.push_back((layer + head) % 2 == 0 ? 1.0f : 0.1f);
    }
  }
  const auto reports = Run(0.5f, thresholds);
  ASSERT_EQ(reports.size(), 3u);
  for (int32_t layer = 0; layer < 3; ++layer) {
    for (int32_t head = 0; head < num_heads(); ++head) {
      EXPECT_EQ(reports[layer].heads.density[head] == 1, (layer + head) % 2 == 0)
          << layer << " " << head;
    }
  }
}

TEST_F(HeadThresholdsSpec, EqualOnesAreTheThresholdOfTheOptions) {
  const std::vector<float> thresholds(static_cast<size_t>(3 * num_heads()), 0.6f);
  const auto heads = Run(0.9f, thresholds);
  const auto options = Run(0.6f, {});
  for (size_t layer = 0; layer < heads.size(); ++layer) {
    EXPECT_EQ(heads[layer].heads.density, options[layer].heads.density);
  }
}

TEST_F(HeadThresholdsSpec, AnotherNumberThanTheModelHasHeadsIsRefused) {
  const std::vector<float> thresholds(5, 0.5f);
  const auto plan = PlanPrefill(*model_, {.num_tokens = kTokens,
                                          .attention = SmallBlocks(0.5f),
                                          .head_thresholds = thresholds});
  EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(plan.status().message(),
            "head_thresholds has 5 values; the model's layers have " +
                std::to_string(3 * num_heads()) + " query heads");
}

}  // namespace
}  // namespace pbs
