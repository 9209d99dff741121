// Spec: profiles, thresholds of heads and threshold_min in
// server/codec/prefill_request.h.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "server/codec/prefill_request.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const std::vector<Profile>& Profiles() {
  static const auto& profiles =
      *new std::vector<Profile>{PaperProfile(),
                                {.name = "heads",
                                 .options = DefaultOptions(Method::kXAttention),
                                 .dense_fallback = false,
                                 .head_thresholds = {0.5f, 1, 0.9f, 0.25f},
                                 .thresholds_digest = "d"}};
  return profiles;
}

PrefillLimits Limits() {
  PrefillLimits limits;
  limits.tokens_max = 1000;
  limits.vocab_size = 512;
  limits.num_layers = 2;
  limits.num_heads = 2;
  limits.num_kv_heads = 1;
  limits.head_dim = 64;
  limits.profiles = Profiles();
  limits.model_name = "tiny";
  limits.has_deadline = true;
  limits.chunk_bytes_default = 1 << 20;
  return limits;
}

v1::PrefillRequest Request() {
  v1::PrefillRequest request;
  request.add_token_ids(1);
  return request;
}

void AddLayers(v1::PrefillRequest& request,
               const std::vector<std::vector<float>>& layers) {
  for (const std::vector<float>& heads : layers) {
    request.add_layers()->mutable_thresholds()->Add(heads.begin(), heads.end());
  }
}

TEST(PrefillProfileSpec, PaperIsPbsAsPublished) {
  v1::PrefillRequest request = Request();
  request.set_profile("paper");
  const auto named = DecodePrefill(request, Limits());
  ASSERT_TRUE(named.ok()) << named.status();
  v1::PrefillRequest spelled = Request();
  spelled.mutable_attention()->mutable_pbs();
  spelled.mutable_attention()->set_as_published(true);
  EXPECT_EQ(named->attention, DecodePrefill(spelled, Limits())->attention);
  EXPECT_THAT(named->head_thresholds, IsEmpty());
}

TEST(PrefillProfileSpec, AProfileGivesMethodAndThresholds) {
  v1::PrefillRequest request = Request();
  request.set_profile("heads");
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->attention.method, Method::kXAttention);
  EXPECT_FALSE(spec->attention.dense_fallback);
  EXPECT_THAT(spec->head_thresholds, ElementsAre(0.5f, 1, 0.9f, 0.25f));
  EXPECT_EQ(spec->thresholds_digest, "d");
}

TEST(PrefillProfileSpec, OptionsWithoutAMethodChangeTheProfile) {
  v1::PrefillRequest request = Request();
  request.set_profile("heads");
  request.mutable_attention()->set_sink_blocks(3);
  request.mutable_attention()->set_coverage_rows(8);
  request.mutable_attention()->set_dense_fallback(true);
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->attention.sink_blocks, 3);
  EXPECT_EQ(spec->attention.coverage_rows, 8);
  EXPECT_TRUE(spec->attention.dense_fallback);
}

TEST(PrefillLayersSpec, ThresholdsOfTheRequestAreThoseOfTheHeads) {
  v1::PrefillRequest request = Request();
  request.mutable_attention()->mutable_prism();
  AddLayers(request, {{0.5f, 1}, {0.75f, 0.25f}});
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_THAT(spec->head_thresholds, ElementsAre(0.5f, 1, 0.75f, 0.25f));
  EXPECT_EQ(spec->thresholds_digest.size(), 64u);
}

TEST(PrefillLayersSpec, EqualThresholdsAreTheMethodsThreshold) {
  v1::PrefillRequest request = Request();
  request.mutable_attention()->mutable_pbs();
  AddLayers(request, {{0.5f, 0.5f}, {0.5f, 0.5f}});
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->attention.threshold, 0.5f);
  EXPECT_THAT(spec->head_thresholds, IsEmpty());
  EXPECT_EQ(spec->thresholds_digest, "");
}

TEST(PrefillThresholdMinSpec, MayBeUpToTheThreshold) {
  v1::PrefillRequest request = Request();
  request.mutable_attention()->mutable_pbs()->set_threshold(0.75f);
  request.set_threshold_min(0.75f);
  const auto spec = DecodePrefill(request, Limits());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->threshold_min, 0.75f);
}

struct RefusedCase {
  const char* name;
  std::function<void(v1::PrefillRequest&)> change;
  const char* message;
  bool has_deadline = true;
};

class RefusedProfileRequestSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedProfileRequestSpec, NamesFieldValueAndLimit) {
  v1::PrefillRequest request = Request();
  GetParam().change(request);
  PrefillLimits limits = Limits();
  limits.has_deadline = GetParam().has_deadline;
  const auto spec = DecodePrefill(request, limits);
  EXPECT_EQ(spec.status(), absl::InvalidArgumentError(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Profiles, RefusedProfileRequestSpec,
    testing::Values(
        RefusedCase{"unknown", [](auto& r) { r.set_profile("mine\n"); },
                    "no profile \"mine\\n\"; model \"tiny\" has \"paper\", "
                    "\"heads\""},
        RefusedCase{"too_long", [](auto& r) { r.set_profile(std::string(129, 'a')); },
                    "profile has 129 bytes, more than 128"},
        RefusedCase{"with_a_method",
                    [](auto& r) {
                      r.set_profile("heads");
                      r.mutable_attention()->mutable_pbs();
                    },
                    "profile \"heads\" and a method in attention exclude each other"},
        RefusedCase{"as_published_without_a_method",
                    [](auto& r) {
                      r.set_profile("heads");
                      r.mutable_attention()->set_as_published(true);
                    },
                    "as_published needs a method"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Layers, RefusedProfileRequestSpec,
    testing::Values(
        RefusedCase{"with_a_profile",
                    [](auto& r) {
                      r.set_profile("heads");
                      AddLayers(r, {{1, 1}, {1, 0.5f}});
                    },
                    "layers and profile \"heads\" exclude each other"},
        RefusedCase{"without_a_method",
                    [](auto& r) {
                      AddLayers(r, {{1, 1}, {1, 0.5f}});
                    },
                    "layers needs a method in attention that has a threshold"},
        RefusedCase{"of_a_method_without_threshold",
                    [](auto& r) {
                      r.mutable_attention()->mutable_flashprefill();
                      AddLayers(r, {{1, 1}, {1, 0.5f}});
                    },
                    "layers needs a method in attention that has a threshold"},
        RefusedCase{"with_a_threshold",
                    [](auto& r) {
                      r.mutable_attention()->mutable_pbs()->set_threshold(0.9f);
                      AddLayers(r, {{1, 1}, {1, 0.5f}});
                    },
                    "attention sets a threshold beside the thresholds of layers; leave "
                    "one out"},
        RefusedCase{"of_another_number",
                    [](auto& r) {
                      r.mutable_attention()->mutable_pbs();
                      AddLayers(r, {{1, 1}});
                    },
                    "layers has 1 entries; the model has 2 layers"},
        RefusedCase{"out_of_range",
                    [](auto& r) {
                      r.mutable_attention()->mutable_pbs();
                      AddLayers(r, {{1, 1}, {1, 1.5f}});
                    },
                    "layers[1].thresholds[1] 1.5 is outside (0, 1]"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    ThresholdMin, RefusedProfileRequestSpec,
    testing::Values(
        RefusedCase{"without_a_deadline", [](auto& r) { r.set_threshold_min(0.5f); },
                    "threshold_min 0.5 needs a deadline of the call", false},
        RefusedCase{"above_the_threshold", [](auto& r) { r.set_threshold_min(0.95f); },
                    "threshold_min 0.95 is outside (0, 0.9], up to the threshold"},
        RefusedCase{"zero", [](auto& r) { r.set_threshold_min(0); },
                    "threshold_min 0 is outside (0, 0.9], up to the threshold"},
        RefusedCase{"of_a_method_without_threshold",
                    [](auto& r) {
                      r.mutable_attention()->mutable_dense();
                      r.set_threshold_min(0.5f);
                    },
                    "threshold_min 0.5 needs a method with a threshold; dense has "
                    "none"},
        RefusedCase{"with_thresholds_of_heads",
                    [](auto& r) {
                      r.set_profile("heads");
                      r.set_threshold_min(0.5f);
                    },
                    "threshold_min 0.5 needs one threshold; here each query head has "
                    "its own"}),
    testing_support::CaseName());

TEST(PrefillProfileFingerprintSpec, DependsOnThresholdsOfHeadsAndOnThresholdMin) {
  const auto fingerprint = [](const v1::PrefillRequest& request) {
    return PrefillFingerprint(*DecodePrefill(request, Limits()), "m");
  };
  v1::PrefillRequest plain = Request();
  plain.mutable_attention()->mutable_pbs();
  v1::PrefillRequest layers = plain;
  AddLayers(layers, {{0.5f, 1}, {0.75f, 0.25f}});
  v1::PrefillRequest lowered = plain;
  lowered.set_threshold_min(0.5f);
  EXPECT_NE(fingerprint(plain), fingerprint(layers));
  EXPECT_NE(fingerprint(plain), fingerprint(lowered));
}

}  // namespace
}  // namespace pbs::server
