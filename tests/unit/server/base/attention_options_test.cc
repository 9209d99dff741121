// Spec: server/base/attention_options.h.
#include "server/base/attention_options.h"

#include <gtest/gtest.h>

#include <functional>
#include <optional>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

AttentionOptions Decoded(const v1::AttentionOptions& wire,
                         const AttentionOptions& profile = {},
                         bool dense_fallback = false) {
  const auto options = DecodeAttentionOptions(wire, {profile}, dense_fallback);
  EXPECT_TRUE(options.ok()) << options.status();
  return *options;
}

TEST(AttentionOptionsWire, NoMethodMeansTheProfile) {
  AttentionOptions profile;
  profile.method = Method::kMeanPooling;
  profile.threshold = 0.7f;
  profile.coverage_rows = 4;
  EXPECT_EQ(Decoded({}, profile), profile);
}

TEST(AttentionOptionsWire, ANamedMethodStartsFromItsDefaultsNotFromTheProfile) {
  AttentionOptions profile;
  profile.threshold = 0.7f;
  profile.segment_size = 512;
  v1::AttentionOptions wire;
  wire.mutable_pbs()->set_block_size(64);
  AttentionOptions expected;
  expected.block_size = 64;
  EXPECT_EQ(Decoded(wire, profile), expected);
}

TEST(AttentionOptionsWire, UnsetDenseFallbackIsTheCallersDefault) {
  EXPECT_TRUE(Decoded({}, {}, true).dense_fallback);
  EXPECT_FALSE(Decoded({}, {}, false).dense_fallback);
  v1::AttentionOptions wire;
  wire.set_dense_fallback(false);
  EXPECT_FALSE(Decoded(wire, {}, true).dense_fallback);
}

struct FallbackCase {
  const char* name;
  std::optional<bool> request;
  bool names_method;
  std::optional<bool> profile;
  bool default_of_rpc;
  bool expected;
};

class DenseFallbackSpec : public testing::TestWithParam<FallbackCase> {};

TEST_P(DenseFallbackSpec, IsTheRequestsThenTheProfilesThenTheRpcs) {
  const FallbackCase& c = GetParam();
  v1::AttentionOptions wire;
  if (c.names_method) wire.mutable_mean_pooling();
  if (c.request.has_value()) wire.set_dense_fallback(*c.request);
  const AttentionProfile profile = {.options = {}, .dense_fallback = c.profile};
  const auto options = DecodeAttentionOptions(wire, profile, c.default_of_rpc);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->dense_fallback, c.expected);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, DenseFallbackSpec,
    testing::Values(FallbackCase{"nobody_says", {}, false, {}, true, true},
                    FallbackCase{"profile_turns_it_off", {}, false, false, true, false},
                    FallbackCase{"profile_turns_it_on", {}, false, true, false, true},
                    FallbackCase{"the_request_wins", true, false, false, false, true},
                    FallbackCase{
                        "a_named_method_has_no_profile", {}, true, false, true, true}),
    testing_support::CaseName());

TEST(AttentionProfileWire, SaysDenseFallbackOnlyWhereItIsSet) {
  v1::AttentionOptions wire;
  wire.mutable_pbs()->set_threshold(0.5f);
  const auto unset = DecodeAttentionProfile(wire);
  ASSERT_TRUE(unset.ok()) << unset.status();
  EXPECT_EQ(unset->options.threshold, 0.5f);
  EXPECT_EQ(unset->dense_fallback, std::nullopt);
  EXPECT_FALSE(EncodeAttentionProfile(*unset).has_dense_fallback());
  for (bool value : {false, true}) {
    wire.set_dense_fallback(value);
    const auto set = DecodeAttentionProfile(wire);
    ASSERT_TRUE(set.ok()) << set.status();
    EXPECT_EQ(set->dense_fallback, value);
    EXPECT_TRUE(EncodeAttentionProfile(*set).has_dense_fallback());
    EXPECT_EQ(EncodeAttentionProfile(*set).dense_fallback(), value);
  }
}

TEST(AttentionOptionsWire, AnExplicitFalseIsNotADefault) {
  v1::AttentionOptions wire;
  wire.mutable_pbs()->set_force_first_block(false);
  EXPECT_FALSE(Decoded(wire).force_first_block);
}

TEST(AttentionOptionsWire, EveryFieldSurvivesARoundTrip) {
  AttentionOptions pbs;
  pbs.block_size = 64;
  pbs.segment_size = 512;
  pbs.threshold = 0.75f;
  pbs.scope = Scope::kQueryHead;
  pbs.force_first_block = false;
  pbs.use_given_order = true;
  pbs.use_given_lists = true;
  pbs.coverage_rows = 8;
  EXPECT_EQ(Decoded(EncodeAttentionOptions(pbs), {}, true), pbs);

  AttentionOptions mean;
  mean.method = Method::kMeanPooling;
  mean.block_size = 32;
  mean.threshold = 0.5f;
  mean.dense_fallback = true;
  EXPECT_EQ(Decoded(EncodeAttentionOptions(mean)), mean);

  AttentionOptions dense;
  dense.method = Method::kDense;
  dense.block_size = 256;
  EXPECT_EQ(Decoded(EncodeAttentionOptions(dense)), dense);
}

struct RefusedCase {
  const char* name;
  std::function<void(v1::AttentionOptions&)> change;
  absl::StatusCode code;
  const char* message;
};

class RefusedOptionsSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedOptionsSpec, SaysWhy) {
  v1::AttentionOptions wire;
  GetParam().change(wire);
  const auto options = DecodeAttentionOptions(wire, {}, false);
  EXPECT_EQ(options.status(), absl::Status(GetParam().code, GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedOptionsSpec,
    testing::Values(
        RefusedCase{
            "scope",
            [](auto& w) { w.mutable_pbs()->set_scope(static_cast<v1::Scope>(9)); },
            absl::StatusCode::kInvalidArgument,
            "scope 9 is not one of KV_HEAD (1), QUERY_HEAD (2)"},
        RefusedCase{"xattention", [](auto& w) { w.mutable_xattention(); },
                    absl::StatusCode::kUnimplemented,
                    "attention method xattention is reserved; this server runs dense, "
                    "pbs and mean_pooling"},
        RefusedCase{"minference", [](auto& w) { w.mutable_minference(); },
                    absl::StatusCode::kUnimplemented,
                    "attention method minference is reserved; this server runs dense, "
                    "pbs and mean_pooling"},
        RefusedCase{"flexprefill", [](auto& w) { w.mutable_flexprefill(); },
                    absl::StatusCode::kUnimplemented,
                    "attention method flexprefill is reserved; this server runs dense, "
                    "pbs and mean_pooling"}),
    testing_support::CaseName());

TEST(AttentionOptionsWire, MethodsKeepTheirNames) {
  EXPECT_EQ(EncodeMethod(Method::kDense), v1::DENSE);
  EXPECT_EQ(EncodeMethod(Method::kPbs), v1::PBS);
  EXPECT_EQ(EncodeMethod(Method::kMeanPooling), v1::MEAN_POOLING);
}

}  // namespace
}  // namespace pbs::server
