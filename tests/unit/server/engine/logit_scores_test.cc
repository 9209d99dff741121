// Spec: server/engine/logit_scores.h.
#include "server/engine/logit_scores.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<int32_t> Ids(const std::vector<ScoredToken>& tokens) {
  std::vector<int32_t> ids;
  for (const ScoredToken& token : tokens) ids.push_back(token.token_id);
  return ids;
}

struct BestCase {
  const char* name;
  std::vector<float> logits;
  int32_t count;
  std::vector<int32_t> ids;
};

class BestTokensSpec : public testing::TestWithParam<BestCase> {};

TEST_P(BestTokensSpec, AreInFallingOrderOfTheirLogits) {
  const auto tokens = BestTokens(GetParam().logits, GetParam().count);
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  EXPECT_EQ(Ids(*tokens), GetParam().ids);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BestTokensSpec,
    testing::Values(BestCase{"one", {1, 3, 2}, 1, {1}},
                    BestCase{"all", {1, 3, 2}, 3, {1, 2, 0}},
                    BestCase{"more_than_there_are", {1, 3}, 5, {1, 0}},
                    BestCase{"none", {1, 3}, 0, {}},
                    BestCase{"ties_by_token_id", {5, 7, 7, 7}, 2, {1, 2}},
                    BestCase{"single_token", {-4}, 1, {0}},
                    BestCase{
                        "impossible_tokens_come_last", {-kInf, 0, 1}, 3, {2, 1, 0}}),
    testing_support::CaseName());

TEST(BestTokens, LogProbabilitiesAreThoseOfTheSoftmax) {
  const auto tokens = BestTokens(std::vector<float>{std::log(1.0f), std::log(3.0f)}, 2);
  ASSERT_TRUE(tokens.ok());
  EXPECT_NEAR((*tokens)[0].log_probability, std::log(0.75), 1e-6);
  EXPECT_NEAR((*tokens)[1].log_probability, std::log(0.25), 1e-6);
}

TEST(BestTokens, LargeLogitsDoNotOverflow) {
  const auto tokens = BestTokens(std::vector<float>{1e30f, 0.0f}, 1);
  ASSERT_TRUE(tokens.ok());
  EXPECT_EQ((*tokens)[0].log_probability, 0.0f);
}

struct BadCase {
  const char* name;
  std::vector<float> logits;
};

class BadLogitsSpec : public testing::TestWithParam<BadCase> {};

TEST_P(BadLogitsSpec, AreOurFault) {
  EXPECT_EQ(BestTokens(GetParam().logits, 1).status(),
            absl::InternalError("the model's logits are not finite"));
}

INSTANTIATE_TEST_SUITE_P(Cases, BadLogitsSpec,
                         testing::Values(BadCase{"nan", {0, NAN, 1}},
                                         BadCase{"nan_first", {NAN, 0}},
                                         BadCase{"infinity", {0, kInf}},
                                         BadCase{"nothing_possible", {-kInf, -kInf}}),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
