// Spec: server/config/profile_file.h.
#include "server/config/profile_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

// Two layers of two query heads.
const ProfiledModel kModel = {"d1", 2, 2, 1, 64};

constexpr char kLayers[] =
    R"("layers": [{"thresholds": [0.5, 1]}, {"thresholds": [0.9, 0.25]}])";

std::string Json(const std::string& attention, const std::string& layers = kLayers,
                 const std::string& name = "mine") {
  return R"({"name": ")" + name + R"(", "model_digest": "d1", "attention": )" +
         attention + (layers.empty() ? "" : ", " + layers) + "}";
}

TEST(ProfileFileSpec, HasAThresholdForEveryHeadOfEveryLayer) {
  const auto profile = ParseProfile(
      Json(R"({"pbs": {"block_size": 64}, "dense_fallback": false})"), kModel);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->name, "mine");
  EXPECT_EQ(profile->options.method, Method::kPbs);
  EXPECT_EQ(profile->options.block_size, 64);
  EXPECT_EQ(profile->dense_fallback, false);
  EXPECT_THAT(profile->head_thresholds, ElementsAre(0.5f, 1.0f, 0.9f, 0.25f));
  EXPECT_EQ(profile->thresholds_digest.size(), 64u);
}

TEST(ProfileFileSpec, EqualThresholdsAreTheThresholdOfTheOptions) {
  const auto profile = ParseProfile(
      Json(R"({"xattention": {}})",
           R"("layers": [{"thresholds": [0.5, 0.5]}, {"thresholds": [0.5, 0.5]}])"),
      kModel);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->options.threshold, 0.5f);
  EXPECT_THAT(profile->head_thresholds, IsEmpty());
  EXPECT_EQ(profile->thresholds_digest, "");
}

TEST(ProfileFileSpec, WithoutLayersItMayBeOfAnyMethod) {
  const auto profile =
      ParseProfile(Json(R"({"flexprefill": {"gamma": 0.8}})", ""), kModel);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->options.gamma, 0.8f);
  EXPECT_THAT(profile->head_thresholds, IsEmpty());
}

TEST(ProfileFileSpec, TheDigestIsThatOfTheThresholdsAlone) {
  const auto first = ParseProfile(Json(R"({"pbs": {}})"), kModel);
  const auto renamed = ParseProfile(Json(R"({"prism": {}})", kLayers, "b"), kModel);
  const auto other = ParseProfile(
      Json(R"({"pbs": {}})",
           R"("layers": [{"thresholds": [0.5, 1]}, {"thresholds": [0.9, 0.26]}])"),
      kModel);
  EXPECT_EQ(first->thresholds_digest, renamed->thresholds_digest);
  EXPECT_NE(first->thresholds_digest, other->thresholds_digest);
}

struct RefusedCase {
  const char* name;
  std::string json;
  const char* message;
};

class RefusedProfileSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedProfileSpec, NamesFieldValueAndLimit) {
  const auto profile = ParseProfile(GetParam().json, kModel);
  EXPECT_EQ(profile.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(profile.status().message()),
              testing::HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedProfileSpec,
    testing::Values(
        RefusedCase{"no_json", "{", "it is not the JSON of a profile: Unexpected end"},
        RefusedCase{"no_object", "[]", "it is not the JSON of a profile: "},
        RefusedCase{"bytes", "\x01\xFF{", "it is not the JSON of a profile: "},
        RefusedCase{"unknown_field", R"({"nam": "x"})", "nam"},
        RefusedCase{"no_name", Json(R"({"pbs": {}})", kLayers, ""),
                    "name \"\" is not 1 to 64 of [A-Za-z0-9._-]"},
        RefusedCase{"odd_name", Json(R"({"pbs": {}})", kLayers, "a b"),
                    "name \"a b\" is not 1 to 64 of [A-Za-z0-9._-]"},
        RefusedCase{"built_in_name", Json(R"({"pbs": {}})", kLayers, "paper"),
                    "name \"paper\" is built in; take another"},
        RefusedCase{"another_models",
                    R"({"name": "x", "model_digest": "d2", "attention": {"pbs": {}}})",
                    "model_digest \"d2\" is not the model's, d1"},
        RefusedCase{"no_method", Json("{}"), "attention names no method"},
        RefusedCase{"method_without_threshold", Json(R"({"flexprefill": {}})"),
                    "method flexprefill has no head_thresholds; pbs, mean_pooling, "
                    "xattention, prism have them"},
        RefusedCase{"two_thresholds", Json(R"({"pbs": {"threshold": 0.9}})"),
                    "attention sets a threshold beside the thresholds of layers; leave "
                    "one out"},
        RefusedCase{"option_out_of_range", Json(R"({"pbs": {"block_size": 100}})"),
                    "block_size 100 is not a power of two in [16, 256]"},
        RefusedCase{"given_lists", Json(R"({"pbs": {"use_given_lists": true}})"),
                    "use_given_order and use_given_lists need tensors that only a "
                    "request has; a profile has them false"},
        RefusedCase{"too_few_layers",
                    Json(R"({"pbs": {}})", R"("layers": [{"thresholds": [0.5, 1]}])"),
                    "layers has 1 entries; the model has 2 layers"},
        RefusedCase{"too_many_heads",
                    Json(R"({"pbs": {}})", R"("layers": [{"thresholds": [0.5, 1]},
                                                        {"thresholds": [1, 1, 1]}])"),
                    "layers[1].thresholds has 3 entries; the model has 2 query heads"},
        RefusedCase{"threshold_of_zero",
                    Json(R"({"pbs": {}})", R"("layers": [{"thresholds": [0.5, 0]},
                                                        {"thresholds": [1, 1]}])"),
                    "layers[0].thresholds[1] 0 is outside (0, 1]"},
        RefusedCase{"threshold_of_nan",
                    Json(R"({"pbs": {}})", R"("layers": [{"thresholds": ["NaN", 1]},
                                                        {"thresholds": [1, 1]}])"),
                    "layers[0].thresholds[0] nan is outside (0, 1]"}),
    testing_support::CaseName());

TEST(ProfileFileSpec, AnErrorOfAFileBeginsWithItsPath) {
  const std::string path = testing::TempDir() + "/profile.json";
  std::ofstream(path) << "{}";
  EXPECT_THAT(std::string(LoadProfile(path, kModel).status().message()),
              testing::StartsWith("profile " + path + ": name"));
  const auto missing = LoadProfile(path + "_missing", kModel);
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(missing.status().message(),
            "profile " + path + "_missing: No such file or directory");
}

TEST(ProfileFileSpec, AFileBeyondTheLimitIsRefused) {
  const std::string path = testing::TempDir() + "/long_profile.json";
  std::ofstream(path) << std::string(kProfileBytesMax + 1, ' ');
  EXPECT_EQ(LoadProfile(path, kModel).status().message(),
            "profile " + path + ": the file has more than 8388608 bytes");
}

}  // namespace
}  // namespace pbs::server
