// Spec: server/model/prefill_plan.h, kv_cache.h, sampling.h, and what
// PrefillRun::Start() refuses.
#include "server/model/prefill_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "server/model/prefill.h"
#include "server/model/sampling.h"
#include "tests/support/case_name.h"
#include "tests/unit/model/tiny_prefill.h"

namespace pbs {
namespace {

using namespace tiny_prefill;  // NOLINT

struct PlanCase {
  const char* name;
  PrefillProblem problem;
  const char* message;
};

void PrintTo(const PlanCase& c, std::ostream* out) { *out << c.name; }

class RefusedPlanSpec : public PrefillRunSpec,
                        public testing::WithParamInterface<PlanCase> {};

TEST_P(RefusedPlanSpec, NamesFieldValueAndLimit) {
  EXPECT_EQ(PlanPrefill(*model_, GetParam().problem).status().message(),
            GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedPlanSpec,
    testing::Values(
        PlanCase{"no_tokens", {.num_tokens = 0}, "num_tokens 0 is outside [1, 4096]"},
        PlanCase{"one_too_many",
                 {.num_tokens = 4097},
                 "num_tokens 4097 is outside [1, 4096]"},
        PlanCase{"negative_past",
                 {.num_tokens = 1, .past_len = -1},
                 "past_len -1 with num_tokens 1 is outside [0, 4095]"},
        PlanCase{"past_and_tokens_too_long",
                 {.num_tokens = 96, .past_len = 4001},
                 "past_len 4001 with num_tokens 96 is outside [0, 4000]"},
        PlanCase{"row_past_the_end",
                 {.num_tokens = 5, .logit_rows = {0, 5}},
                 "logit_rows holds 5, outside [0, 4]"},
        PlanCase{"negative_row",
                 {.num_tokens = 5, .logit_rows = {-1}},
                 "logit_rows holds -1, outside [0, 4]"},
        PlanCase{"too_many_rows",
                 {.num_tokens = 5, .logit_rows = std::vector<int32_t>(1025, 0)},
                 "1025 logit_rows exceed 1024"},
        PlanCase{"prompts_of_another_sum",
                 {.num_tokens = 5, .prompt_tokens = {2, 2}},
                 "prompt_tokens add up to 4; num_tokens is 5"},
        PlanCase{"an_empty_prompt_among_others",
                 {.num_tokens = 5, .prompt_tokens = {5, 0}},
                 "num_tokens 0 is outside [1, 4096]"},
        PlanCase{"prompts_with_a_past",
                 {.num_tokens = 5, .past_len = 1, .prompt_tokens = {2, 3}},
                 "several prompts run as one without past_len, a given order and given "
                 "lists"},
        PlanCase{"attention_options",
                 {.num_tokens = 5, .attention = {.block_size = 5}},
                 "block_size 5 is not a power of two in [16, 256]"}),
    testing_support::CaseName());

TEST_F(PrefillRunSpec, PlansMemoryByPart) {
  const auto plan =
      PlanPrefill(*model_, {.num_tokens = 100, .attention = kDenseOptions});
  ASSERT_TRUE(plan.ok());
  const PrefillMemory& memory = plan->memory;
  const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  EXPECT_EQ(memory.residual, align(100 * 48 * 4));
  EXPECT_EQ(memory.queries, 2 * align(100 * 4 * 32 * 4));
  EXPECT_EQ(memory.rotations, 2 * align(100 * 16 * 4));
  EXPECT_EQ(memory.tokens, align(100 * 4));
  EXPECT_EQ(memory.attention, align(plan->attention->workspace_bytes));
  // Norms or attention outputs; projections or MLP activations.
  EXPECT_EQ(memory.tiles, align(100 * 128 * 4) + align(100 * 256 * 4));
  EXPECT_EQ(memory.logits,
            align(4) + 2 * align(48 * 4) + align(4 * 32 * 4) + align(97 * 4));
  EXPECT_EQ(plan->workspace_bytes,
            memory.residual + memory.queries + memory.rotations + memory.tokens +
                memory.logits +
                std::max(memory.attention, memory.tiles + memory.linear));
}

// What the engine relies on: prompts that were charged one by one may run together.
TEST_F(PrefillRunSpec, PromptsThatRunAsOneTakeNoMoreThanTheyDoAlone) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 200; ++trial) {
    AttentionOptions attention = kDenseOptions;
    if (trial % 2 == 1) attention = {.block_size = 16, .segment_size = 32};
    PrefillProblem together = {.attention = attention};
    int64_t alone = 0;
    const uint32_t num_prompts = 2 + random() % 20;
    for (uint32_t i = 0; i < num_prompts; ++i) {
      const auto tokens = static_cast<int32_t>(1 + random() % 200);
      const auto plan =
          PlanPrefill(*model_, {.num_tokens = tokens, .attention = attention});
      ASSERT_TRUE(plan.ok());
      alone += plan->workspace_bytes;
      together.num_tokens += tokens;
      together.prompt_tokens.push_back(tokens);
      together.logit_rows.push_back(together.num_tokens - 1);
    }
    const auto plan = PlanPrefill(*model_, together);
    ASSERT_TRUE(plan.ok()) << plan.status().ToString();
    EXPECT_LE(plan->workspace_bytes, alone) << "trial " << trial;
  }
}

TEST_F(PrefillRunSpec, PoolsNoQueriesForABackendThatDoesItItself) {
  const auto plan = PlanPrefill(*model_, {.num_tokens = 1000});
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->attention->pooled_queries_bytes, 0);
  EXPECT_EQ(plan->memory.pooled_queries, 0);
}

TEST_F(PrefillRunSpec, BoundsRowTilesHoweverLongThePrompt) {
  const int32_t tile = backend_->info().row_tile;
  const auto small =
      PlanPrefill(*model_, {.num_tokens = tile, .attention = kDenseOptions});
  const auto large =
      PlanPrefill(*model_, {.num_tokens = 4 * tile, .attention = kDenseOptions});
  ASSERT_TRUE(small.ok() && large.ok());
  EXPECT_EQ(small->memory.tiles, large->memory.tiles);
  EXPECT_EQ(small->memory.linear, large->memory.linear);
  EXPECT_EQ(4 * small->memory.residual, large->memory.residual);
}

TEST_F(PrefillRunSpec, RefusesInputsThatDoNotFitThePlan) {
  const auto plan = PlanPrefill(*model_, {.num_tokens = 4, .attention = kDenseOptions});
  ASSERT_TRUE(plan.ok());
  auto workspace = backend_->Allocate(plan->workspace_bytes);
  KvCache cache = MakeCache(*model_, 4);
  const auto message = [&](std::vector<int32_t> tokens, KvCache& kv, Workspace space) {
    return PrefillRun::Start(*model_, *plan, {.tokens = tokens}, kv, space)
        .status()
        .message();
  };
  const Workspace whole = workspace->workspace();
  EXPECT_EQ(message({1, 2, 3}, cache, whole), "3 tokens were given; num_tokens is 4");
  EXPECT_EQ(message({1, 2, 3, 97}, cache, whole),
            "the token at position 3 is outside [0, 96]");
  EXPECT_EQ(message({1, 2, -3, 4}, cache, whole),
            "the token at position 2 is outside [0, 96]");
  KvCache small = MakeCache(*model_, 3);
  EXPECT_EQ(message({1, 2, 3, 4}, small, whole),
            "past_len + num_tokens 4 exceeds the KV cache's capacity 3");
  KvShape other = model_->kv_shape(4);
  other.dtype = DType::kF16;
  KvCache narrow = *KvCache::Create(other, *backend_);
  EXPECT_EQ(message({1, 2, 3, 4}, narrow, whole),
            "the KV cache was made for another model or dtype");
  EXPECT_EQ(message({1, 2, 3, 4}, cache, {whole.data, whole.bytes - 1}),
            "the workspace has " + std::to_string(whole.bytes - 1) +
                " bytes; the plan asks for " + std::to_string(whole.bytes));
}

TEST_F(PrefillRunSpec, RefusesAPastThatTheCacheDoesNotHold) {
  const auto plan = PlanPrefill(
      *model_, {.num_tokens = 1, .past_len = 3, .attention = kDenseOptions});
  auto workspace = backend_->Allocate(plan->workspace_bytes);
  KvCache cache = MakeCache(*model_, 8);
  cache.set_num_tokens(2);
  const std::vector<int32_t> tokens = {1};
  EXPECT_EQ(PrefillRun::Start(*model_, *plan, {.tokens = tokens}, cache,
                              workspace->workspace())
                .status()
                .message(),
            "past_len 3 exceeds the tokens in the KV cache, 2");
}

TEST(KvCacheSpec, LaysOutLayersOneBehindAnother) {
  const auto backend = MakeBackend();
  const KvShape shape = {.num_layers = 3,
                         .num_kv_heads = 2,
                         .head_dim = 32,
                         .capacity = 7,
                         .dtype = DType::kBF16};
  EXPECT_EQ(shape.plane_bytes(), 2 * 7 * 32 * 2);
  EXPECT_EQ(shape.bytes(), 3 * 2 * shape.plane_bytes());
  const auto cache = KvCache::Create(shape, *backend);
  ASSERT_TRUE(cache.ok());
  const auto* first = static_cast<const char*>(cache->k(0));
  EXPECT_EQ(static_cast<const char*>(cache->v(0)) - first, shape.plane_bytes());
  EXPECT_EQ(static_cast<const char*>(cache->k(2)) - first, 4 * shape.plane_bytes());
  EXPECT_EQ(cache->head_stride(), 7 * 32);
  EXPECT_EQ(cache->layout().Offset(0, 0, 1, 3), 7 * 32 + 3 * 32);
}

TEST(KvCacheSpec, RefusesACapacityOutsideItsLimits) {
  const auto backend = MakeBackend();
  EXPECT_EQ(KvCache::Create({.capacity = 0}, *backend).status().message(),
            "capacity 0 of the KV cache is outside [1, 1048576]");
}

TEST(SamplingSpec, ArgmaxTakesTheLowestIdOfEqualsAndNeverNan) {
  EXPECT_EQ(Argmax(std::vector<float>{1, 3, 3, 2}), 1);
  EXPECT_EQ(Argmax(std::vector<float>{NAN, -5, NAN}), 1);
  EXPECT_EQ(Argmax(std::vector<float>{-INFINITY}), 0);
}

TEST(SamplingSpec, TopTokensFallAndBreakTiesByTheLowerId) {
  const std::vector<float> logits = {0, 2, 1, 2};
  const auto best = TopTokens(logits, 3);
  ASSERT_EQ(best.size(), 3u);
  EXPECT_EQ(best[0].token_id, 1);
  EXPECT_EQ(best[1].token_id, 3);
  EXPECT_EQ(best[2].token_id, 2);
  const double sum = 1 + 2 * std::exp(2.0) + std::exp(1.0);
  EXPECT_NEAR(best[0].log_probability, 2 - std::log(sum), 1e-6);
  EXPECT_NEAR(best[2].log_probability, 1 - std::log(sum), 1e-6);
}

TEST(SamplingSpec, TopTokensStayInBounds) {
  EXPECT_EQ(TopTokens(std::vector<float>{1, 2}, 5).size(), 2u);
  EXPECT_TRUE(TopTokens(std::vector<float>{1, 2}, 0).empty());
  EXPECT_TRUE(TopTokens({}, 3).empty());
  const auto far = TopTokens(std::vector<float>{1e30f, -1e30f}, 2);
  EXPECT_EQ(far[0].log_probability, 0.0f);
}

}  // namespace
}  // namespace pbs
