// Spec: prefill.proto and kv.proto over real gRPC.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/codec/sparsity_digest.h"
#include "server/model/prefill.h"
#include "tests/integration/test_node.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;

TEST(PrefillSpec, AnswersWithEventsInOrderAndTheFirstToken) {
  TestNode node;
  auto client = node.NewClient();
  v1::PrefillRequest request = PrefillOf(300);
  request.set_top_logits(3);
  request.add_logit_positions(7);
  request.set_all_logits_last_token(true);
  PrefillEvents events;
  const auto done = client->Prefill(request, events);
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_TRUE(events.admitted.has_value());
  EXPECT_FALSE(events.admitted->has_ticket());
  ASSERT_EQ(events.layers.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(events.layers[i].index(), i);
  ASSERT_EQ(done->top_logits_size(), 3);
  EXPECT_EQ(done->top_logits(0).token_id(), done->first_token_id());
  ASSERT_EQ(done->positions_size(), 1);
  EXPECT_EQ(done->positions(0).position(), 7u);
  EXPECT_EQ(done->last_token_logits().size(), 128 * sizeof(float));
  EXPECT_EQ(done->model_digest(), SharedModel::Get().served.model().digest());
  EXPECT_EQ(done->stats().prompt_tokens(), 300);
  EXPECT_EQ(done->stats().layer_density_size(), 3);
  EXPECT_FALSE(done->has_ticket());
  EXPECT_TRUE(node.NothingHeld());
}

// The cache of `request` read by every road: they must agree bit for bit.
void ExpectSameCache(const KvArrays& a, const KvArrays& b) {
  ASSERT_EQ(a.arrays.size(), b.arrays.size());
  for (const auto& [key, bytes] : a.arrays) {
    ASSERT_EQ(bytes, b.arrays.at(key))
        << "layer " << key.first << " kind " << key.second;
  }
}

KvArrays DirectCache(const v1::PrefillRequest& request) {
  const Model& model = SharedModel::Get().served.model();
  PrefillProblem problem;
  problem.num_tokens = request.token_ids_size();
  problem.attention = DefaultProfile().options;
  problem.attention.dense_fallback = true;
  problem.logit_rows = {request.token_ids_size() - 1};
  const auto plan = *PlanPrefill(model, problem);
  KvCache cache = *KvCache::Create(model.kv_shape(problem.num_tokens), model.backend());
  Buffer workspace = *model.backend().Allocate(plan.workspace_bytes);
  const std::vector<int32_t> tokens(request.token_ids().begin(),
                                    request.token_ids().end());
  PrefillInputs inputs;
  inputs.tokens = tokens;
  auto run = *PrefillRun::Start(model, plan, inputs, cache, workspace.workspace());
  while (!run->layers_done()) EXPECT_TRUE(run->RunLayer(nullptr, {}).ok());
  KvArrays arrays;
  for (int32_t layer = 0; layer < cache.shape().num_layers; ++layer) {
    for (auto kind : {v1::KvChunk::K, v1::KvChunk::V}) {
      const void* plane = kind == v1::KvChunk::K ? cache.k(layer) : cache.v(layer);
      const auto target = arrays.Array(layer, kind, cache.shape().plane_bytes());
      std::memcpy(target.data(), plane, target.size());
    }
  }
  return arrays;
}

TEST(PrefillSharedRunSpec, EveryCallerGetsItsOwnCacheAndReply) {
  TestNode node({.batch = {.tokens_max = 1000, .prompt_tokens_max = 300},
                 .executor_thread = false});
  constexpr std::array<int, 3> kTokens = {300, 20, 111};
  std::vector<std::future<absl::StatusOr<v1::Done>>> calls;
  for (int tokens : kTokens) {
    calls.push_back(std::async(std::launch::async, [&node, tokens] {
      PrefillEvents events;
      return node.NewClient()->Prefill(LeaseOf(tokens), events);
    }));
  }
  ASSERT_TRUE(Eventually([&] { return node.Waiting() == 3; }));
  while (node.engine.executor().RunOneStep()) {
  }
  EXPECT_EQ(node.metrics.engine.batch_requests.Collect().histogram.sample_count, 1u);
  for (size_t i = 0; i < calls.size(); ++i) {
    const auto done = calls[i].get();
    ASSERT_TRUE(done.ok()) << done.status();
    EXPECT_EQ(done->stats().prompt_tokens(), kTokens[i]);
    v1::FetchRequest fetch;
    *fetch.mutable_ticket() = done->ticket();
    KvArrays cache;
    ASSERT_TRUE(node.NewClient()->Fetch(fetch, cache).ok());
    const KvArrays alone = DirectCache(LeaseOf(kTokens[i]));
    for (const auto& [key, bytes] : alone.arrays) {
      const auto* expected = reinterpret_cast<const float*>(bytes.data());
      const auto* actual = reinterpret_cast<const float*>(cache.arrays.at(key).data());
      for (size_t j = 0; j < bytes.size() / sizeof(float); ++j) {
        ASSERT_NEAR(actual[j], expected[j], 1e-4);
      }
    }
    ASSERT_TRUE(node.NewClient()->Release(done->ticket()).ok());
  }
  EXPECT_TRUE(node.NothingHeld());
}

TEST(PrefillSpec, InlineAndFetchedCachesAreEqualAsF8E4M3) {
  TestNode node;
  auto client = node.NewClient();
  PrefillEvents events;
  v1::PrefillRequest request = PrefillOf(700);
  auto* wishes = request.mutable_delivery()->mutable_inline_();
  wishes->set_dtype(v1::F8_E4M3);
  wishes->set_page_tokens(16);
  wishes->set_chunk_bytes(64 << 10);
  KvArrays inlined;
  const auto done = client->Prefill(request, events, &inlined);
  ASSERT_TRUE(done.ok()) << done.status();
  const auto lease = client->Prefill(LeaseOf(700), events);
  ASSERT_TRUE(lease.ok()) << lease.status();
  v1::FetchRequest fetch;
  *fetch.mutable_ticket() = lease->ticket();
  fetch.set_dtype(v1::F8_E4M3);
  fetch.set_page_tokens(16);
  KvArrays fetched;
  const absl::Status status = client->Fetch(fetch, fetched);
  ASSERT_TRUE(status.ok()) << status;
  ExpectSameCache(fetched, inlined);
  EXPECT_TRUE(client->Release(lease->ticket()).ok());
  EXPECT_TRUE(node.NothingHeld());
}

TEST(PrefillSpec, InlineFetchedAndDirectCachesAreEqual) {
  TestNode node;
  auto client = node.NewClient();
  PrefillEvents events;

  v1::PrefillRequest inline_request = PrefillOf(700);
  inline_request.mutable_delivery()->mutable_inline_()->set_chunk_bytes(64 << 10);
  KvArrays inlined;
  ASSERT_TRUE(client->Prefill(inline_request, events, &inlined).ok());

  const auto done = client->Prefill(LeaseOf(700), events);
  ASSERT_TRUE(done.ok()) << done.status();
  v1::FetchRequest fetch;
  *fetch.mutable_ticket() = done->ticket();
  KvArrays fetched;
  const absl::Status status = client->Fetch(fetch, fetched);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(fetched.layers, ElementsAre(0, 1, 2));

  ExpectSameCache(fetched, inlined);
  ExpectSameCache(fetched, DirectCache(LeaseOf(700)));
  ASSERT_TRUE(client->Release(done->ticket()).ok());
  EXPECT_TRUE(node.NothingHeld());
}

struct PlannedCase {
  const char* name;
  std::function<void(v1::KvDelivery&)> deliver;
};

class PlannedBytesSpec : public testing::TestWithParam<PlannedCase> {};

TEST_P(PlannedBytesSpec, AreWhatTheLedgerHeldForTheRequest) {
  TestNode node({.executor_thread = false});
  v1::PrefillRequest request = PrefillOf(500);
  request.set_top_logits(5);
  GetParam().deliver(*request.mutable_delivery());
  auto client = node.NewClient();
  KvArrays arrays;
  PrefillEvents events;
  auto result = std::async(std::launch::async,
                           [&] { return client->Prefill(request, events, &arrays); });
  ASSERT_TRUE(Eventually([&] { return node.Waiting() == 1; }));
  const int64_t held = node.ledger.bytes_held();
  ASSERT_TRUE(node.StepUntil([&] {
    return result.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }));
  const auto done = result.get();
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->stats().planned_bytes(), held);
}

TEST_P(PlannedBytesSpec, OneByteLessThanThemCanNeverFit) {
  v1::PrefillRequest request = PrefillOf(500);
  GetParam().deliver(*request.mutable_delivery());
  PrefillEvents events;
  KvArrays arrays;
  const auto planned = [&] {
    TestNode node;
    return node.NewClient()->Prefill(request, events, &arrays)->stats().planned_bytes();
  }();
  TestNode enough({.memory_bytes_max = planned});
  EXPECT_TRUE(enough.NewClient()->Prefill(request, events, &arrays).ok());
  TestNode less({.memory_bytes_max = planned - 1});
  EXPECT_EQ(less.NewClient()->Prefill(request, events, &arrays).status(),
            absl::InvalidArgumentError(absl::StrCat(
                "the request needs ", planned,
                " bytes of memory, more than memory_bytes_max ", planned - 1)));
  EXPECT_EQ(less.metrics.engine.Rejected(RejectReason::kTooLarge).Value(), 1);
  EXPECT_TRUE(less.NothingHeld());
}

INSTANTIATE_TEST_SUITE_P(
    Deliveries, PlannedBytesSpec,
    testing::Values(
        PlannedCase{"none", [](auto&) {}},
        PlannedCase{"lease", [](auto& d) { d.mutable_lease(); }},
        PlannedCase{"inline_as_held", [](auto& d) { d.mutable_inline_(); }},
        PlannedCase{"inline_laid_out_anew",
                    [](auto& d) { d.mutable_inline_()->set_layout(v1::NHD); }},
        PlannedCase{"inline_f8_e4m3",
                    [](auto& d) { d.mutable_inline_()->set_dtype(v1::F8_E4M3); }}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
