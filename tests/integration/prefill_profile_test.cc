// Spec: profiles, thresholds of heads and threshold_min of prefill.proto over real
// gRPC.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "server/codec/sparsity_digest.h"
#include "server/codec/thresholds_digest.h"
#include "server/engine/prefill_task.h"
#include "server/engine/threshold_ladder.h"
#include "tests/integration/test_node.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;

constexpr int32_t kTokens = 700;

// Blocks and segments so small that a prompt of kTokens has many.
v1::PrefillRequest SmallBlocks() {
  v1::PrefillRequest request = PrefillOf(kTokens);
  v1::AttentionOptions& attention = *request.mutable_attention();
  attention.mutable_pbs()->set_block_size(16);
  attention.mutable_pbs()->set_segment_size(32);
  attention.set_dense_fallback(false);
  attention.set_coverage_rows(4);
  return request;
}

AttentionOptions OptionsOf(float threshold) {
  AttentionOptions options;
  options.dense_tail_blocks = kPrefillTailBlocks;
  options.block_size = 16;
  options.segment_size = 32;
  options.threshold = threshold;
  return options;
}

TEST(PrefillLayersSpec, EveryHeadRunsWithItsThreshold) {
  TestNode node;
  auto client = node.NewClient();
  PrefillEvents events;
  v1::PrefillRequest request = SmallBlocks();
  std::vector<float> thresholds;
  for (int layer = 0; layer < 3; ++layer) {
    v1::LayerThresholds& heads = *request.add_layers();
    for (int head = 0; head < 4; ++head) {
      heads.add_thresholds((layer + head) % 2 == 0 ? 1.0f : 0.1f);
      thresholds.push_back(heads.thresholds(head));
    }
  }
  const auto done = client->Prefill(request, events);
  ASSERT_TRUE(done.ok()) << done.status();
  ASSERT_EQ(done->stats().layer_heads_size(), 3);
  for (int layer = 0; layer < 3; ++layer) {
    for (int head = 0; head < 4; ++head) {
      const double density = done->stats().layer_heads(layer).density(head);
      EXPECT_EQ(density == 1, (layer + head) % 2 == 0) << layer << " " << head;
    }
  }
  EXPECT_FALSE(done->stats().has_threshold());
  EXPECT_EQ(done->sparsity_digest(),
            SparsityDigest(OptionsOf(0.9f), kTokens, "", ThresholdsDigest(thresholds)));
}

TEST(PrefillProfileSpec, PaperIsPbsAsPublished) {
  TestNode node;
  auto client = node.NewClient();
  PrefillEvents events;
  v1::PrefillRequest named = PrefillOf(kTokens);
  named.set_profile("paper");
  v1::PrefillRequest spelled = PrefillOf(kTokens);
  spelled.mutable_attention()->mutable_pbs();
  spelled.mutable_attention()->set_as_published(true);
  EXPECT_EQ(client->Prefill(named, events)->sparsity_digest(),
            client->Prefill(spelled, events)->sparsity_digest());
}

TEST(PrefillProfileSpec, ModelsNameTheirProfiles) {
  TestNode node;
  const auto models = node.NewClient()->ListModels();
  ASSERT_TRUE(models.ok()) << models.status();
  ASSERT_EQ(models->models(0).profiles_size(), 1);
  const v1::ProfileInfo& paper = models->models(0).profiles(0);
  EXPECT_EQ(paper.name(), "paper");
  EXPECT_TRUE(paper.attention().as_published());
  EXPECT_EQ(paper.attention().pbs().scope(), v1::QUERY_HEAD);
  EXPECT_FALSE(paper.has_mean_threshold());
}

TEST(PrefillProfileSpec, AnUnknownOneIsRefusedAndTheKnownAreNamed) {
  TestNode node;
  PrefillEvents events;
  v1::PrefillRequest request = PrefillOf(10);
  request.set_profile("mine");
  EXPECT_EQ(
      node.NewClient()->Prefill(request, events).status(),
      absl::InvalidArgumentError("no profile \"mine\"; model \"tiny\" has \"paper\""));
  EXPECT_TRUE(node.NothingHeld());
}

// A prompt of kTokens takes so many seconds at a threshold, as far as the server knows.
class DeadlineThresholdSpec : public testing::Test {
 protected:
  void Takes(float threshold, double seconds) {
    const ServedModel& model = SharedModel::Get().served;
    node_.costs.Measure(PrefillCostKey(model, OptionsOf(threshold)),
                        PrefillWork(kTokens), {seconds, 0}, node_.clock.Now());
  }
  // With a deadline in an hour.
  absl::StatusOr<v1::Done> Prefill(const v1::PrefillRequest& request) {
    PrefillEvents events;
    return node_.NewClient()->Prefill(request, events, nullptr,
                                      {.deadline = absl::Now() + absl::Hours(1)});
  }
  double Lowered() { return node_.metrics.engine.threshold_lowered.Value(); }

  TestNode node_;
};

constexpr double kTooLong = 7200, kFits = 60;

TEST_F(DeadlineThresholdSpec, TheHighestThresholdThatMeetsItIsUsedAndTold) {
  Takes(0.9f, kTooLong);
  Takes(0.85f, kTooLong);
  Takes(0.8f, kFits);
  Takes(0.7f, kFits);
  v1::PrefillRequest request = SmallBlocks();
  request.set_threshold_min(0.3f);
  const auto done = Prefill(request);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->stats().threshold(), 0.8f);
  EXPECT_EQ(done->sparsity_digest(), SparsityDigest(OptionsOf(0.8f), kTokens, ""));
  EXPECT_EQ(Lowered(), 1);
}

TEST_F(DeadlineThresholdSpec, AThresholdThatMeetsItStays) {
  Takes(0.9f, kFits);
  v1::PrefillRequest request = SmallBlocks();
  request.set_threshold_min(0.3f);
  const auto done = Prefill(request);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->stats().threshold(), 0.9f);
  EXPECT_EQ(Lowered(), 0);
}

TEST_F(DeadlineThresholdSpec, WithoutAnEstimateTheThresholdStays) {
  v1::PrefillRequest request = SmallBlocks();
  request.set_threshold_min(0.3f);
  const auto done = Prefill(request);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->stats().threshold(), 0.9f);
}

TEST_F(DeadlineThresholdSpec, WhereNothingMeetsItTheLowestIsTried) {
  Takes(0.9f, kTooLong);  // lower ones were never measured
  v1::PrefillRequest request = SmallBlocks();
  request.set_threshold_min(0.45f);
  const auto done = Prefill(request);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->stats().threshold(), 0.45f);
  EXPECT_EQ(Lowered(), 1);
}

TEST_F(DeadlineThresholdSpec, WithoutPermissionTheRequestIsRefused) {
  Takes(0.9f, kTooLong);
  Takes(0.5f, kFits);
  const auto done = Prefill(SmallBlocks());
  EXPECT_EQ(done.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(done.status().message()), HasSubstr("cannot be met"));
  EXPECT_EQ(Lowered(), 0);
}

// The same key names the same work, whatever the server made of the threshold.
TEST_F(DeadlineThresholdSpec, ARepeatedKeyGetsTheFirstReply) {
  Takes(0.9f, kTooLong);
  Takes(0.5f, kFits);
  v1::PrefillRequest request = SmallBlocks();
  request.mutable_delivery()->mutable_lease();
  request.set_idempotency_key("k");
  request.set_threshold_min(0.5f);
  const auto first = Prefill(request);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_LT(first->stats().threshold(), 0.9f);
  for (int i = 0; i < 50; ++i) Takes(0.9f, kFits);
  const auto second = Prefill(request);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->stats().threshold(), first->stats().threshold());
  EXPECT_EQ(second->sparsity_digest(), first->sparsity_digest());
  ASSERT_TRUE(node_.NewClient()->Release(first->ticket()).ok());
}

}  // namespace
}  // namespace pbs::server
