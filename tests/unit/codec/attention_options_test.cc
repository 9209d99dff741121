// Spec: server/codec/attention_options.h.
#include "server/codec/attention_options.h"

#include <gtest/gtest.h>

#include <cctype>
#include <functional>
#include <optional>
#include <string>

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
    testing::Values(RefusedCase{"scope",
                                [](auto& w) {
                                  w.mutable_pbs()->set_scope(static_cast<v1::Scope>(9));
                                },
                                absl::StatusCode::kInvalidArgument,
                                "scope 9 is not one of KV_HEAD (1), QUERY_HEAD (2)"},
                    RefusedCase{"scope_of_a_permutation",
                                [](auto& w) {
                                  w.mutable_prism();
                                  w.mutable_permutation()->set_scope(
                                      static_cast<v1::Scope>(9));
                                },
                                absl::StatusCode::kInvalidArgument,
                                "scope 9 is not one of KV_HEAD (1), QUERY_HEAD (2)"},
                    RefusedCase{"as_published_without_a_method",
                                [](auto& w) { w.set_as_published(true); },
                                absl::StatusCode::kInvalidArgument,
                                "as_published needs a method"}),
    testing_support::CaseName());

TEST(AttentionOptionsWire, MethodsKeepTheirNames) {
  for (Method method : kMethods) {
    std::string name = v1::Method_Name(EncodeMethod(method));
    for (char& letter : name) letter = static_cast<char>(std::tolower(letter));
    EXPECT_EQ(name, MethodName(method));
  }
}

// A message and the table of methods must not drift apart.
TEST(AttentionOptionsWire, EveryFieldIsAnOptionOfItsMethod) {
  const auto& attention = *v1::AttentionOptions::descriptor();
  for (Method method : kMethods) {
    const auto* field = attention.FindFieldByName(MethodName(method));
    ASSERT_NE(field, nullptr) << MethodName(method);
    for (int i = 0; i < field->message_type()->field_count(); ++i) {
      const std::string& name = field->message_type()->field(i)->name();
      const OptionTraits* option = FindOption(name);
      ASSERT_NE(option, nullptr) << MethodName(method) << " " << name;
      EXPECT_NE(TraitsOf(method).options & option->bit, 0u)
          << MethodName(method) << " " << name;
    }
  }
}

TEST(AttentionOptionsWire, EveryOptionOfEveryMethodSurvivesARoundTrip) {
  for (Method method : kMethods) {
    for (const bool as_published : {false, true}) {
      SCOPED_TRACE(testing::Message() << MethodName(method) << " " << as_published);
      if (method == Method::kDense && as_published) continue;
      AttentionOptions options = DefaultOptions(method, as_published);
      if (!Permutes(options) && TraitsOf(method).Selects()) {
        options.permute = true;
        options.segment_size = 512;
        options.scope = Scope::kQueryHead;
      }
      if (TraitsOf(method).Selects()) {
        options.dense_tail_blocks = 3;
        options.sink_blocks = 4;
        options.window_blocks = 5;
        options.mean_correction = true;
      }
      const auto decoded =
          DecodeAttentionOptions(EncodeAttentionOptions(options), {}, true);
      ASSERT_TRUE(decoded.ok()) << decoded.status();
      EXPECT_EQ(*decoded, options);
    }
  }
}

}  // namespace
}  // namespace pbs::server
