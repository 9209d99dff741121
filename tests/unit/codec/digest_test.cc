// Spec: server/codec/sha256.h and sparsity_digest.h.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "server/codec/prompt_digest.h"
#include "server/codec/sha256.h"
#include "server/codec/sparsity_digest.h"
#include "server/codec/thresholds_digest.h"
#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

std::string HashOf(std::string_view bytes) {
  Sha256 hash;
  hash.Add(bytes);
  return hash.Finish();
}

// FIPS 180-4 examples.
TEST(Sha256Spec, EqualsThePublishedValues) {
  EXPECT_EQ(HashOf(""),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(HashOf("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(HashOf("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(HashOf(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256Spec, DoesNotDependOnHowTheBytesArePassed) {
  const std::string text(300, 'x');
  for (size_t cut : {1, 55, 56, 63, 64, 65, 128, 299}) {
    Sha256 hash;
    hash.Add(std::string_view(text).substr(0, cut));
    hash.Add(std::string_view(text).substr(cut));
    EXPECT_EQ(hash.Finish(), HashOf(text)) << "cut " << cut;
  }
}

TEST(Sha256Spec, FieldsDoNotRunIntoEachOther) {
  Sha256 first, second;
  first.AddField("ab");
  first.AddField("c");
  second.AddField("a");
  second.AddField("bc");
  EXPECT_NE(first.Finish(), second.Finish());
}

struct ExactCase {
  const char* name;
  AttentionOptions options;
  int32_t num_tokens;
};

class ExactDigestSpec : public testing::TestWithParam<ExactCase> {};

TEST_P(ExactDigestSpec, WhatRunsDenseIsExactAndOfItsTenant) {
  const auto digest = [](const char* salt) {
    return SparsityDigest(GetParam().options, GetParam().num_tokens, salt);
  };
  EXPECT_EQ(digest(""), "exact");
  EXPECT_EQ(digest("salt"), "exact-a3a3f6f940be9c05083935d3ee27b76d");
  EXPECT_NE(digest("salt"), digest("another"));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ExactDigestSpec,
    testing::Values(
        ExactCase{"dense", {.method = Method::kDense}, 100'000},
        ExactCase{"every_candidate", {.threshold = 1.0f}, 100'000},
        ExactCase{"mean_pooling_every_candidate",
                  {.method = Method::kMeanPooling, .threshold = 1.0f},
                  100'000},
        ExactCase{"flexprefill_every_candidate",
                  {.method = Method::kFlexPrefill, .gamma = 1.0f},
                  100'000},
        ExactCase{"flexprefill_of_two_blocks", {.method = Method::kFlexPrefill}, 256},
        ExactCase{"minference_of_all_distances",
                  {.method = Method::kMInference, .slash_tokens = 300},
                  300},
        ExactCase{"window_of_the_whole_prompt",
                  {.method = Method::kPrism, .block_size = 64, .window_blocks = 8},
                  512},
        ExactCase{"tail_of_the_whole_prompt",
                  {.method = Method::kPrism, .dense_tail_blocks = 3},
                  384},
        ExactCase{"sorted_keys_of_one_segment",
                  {.method = Method::kPrism, .permute = true},
                  256},
        ExactCase{"prompt_of_one_segment", {}, 256}),
    testing_support::CaseName());

TEST(SparsityDigestSpec, NamesTheMethodAndIsTheSameInEveryBuild) {
  EXPECT_EQ(SparsityDigest({}, 257, ""), "pbs-f4bbc23b7bd1e51ac38f69d3ef4341d5");
  EXPECT_EQ(SparsityDigest({.method = Method::kMeanPooling}, 10, "").substr(0, 13),
            "mean_pooling-");
  std::set<std::string> digests;
  for (Method method : kMethods) {
    digests.insert(SparsityDigest(DefaultOptions(method), 10'000, ""));
  }
  EXPECT_EQ(digests.size(), kMethods.size());
}

struct ChangeCase {
  const char* name;
  std::function<void(AttentionOptions&)> change;
  const char* salt;
};

class DigestChangeSpec : public testing::TestWithParam<ChangeCase> {};

TEST_P(DigestChangeSpec, EveryOptionThatDecidesTheResultChangesIt) {
  AttentionOptions options;
  GetParam().change(options);
  EXPECT_NE(SparsityDigest(options, 10'000, GetParam().salt),
            SparsityDigest({}, 10'000, ""));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, DigestChangeSpec,
    testing::Values(
        ChangeCase{"method", [](auto& o) { o.method = Method::kMeanPooling; }, ""},
        ChangeCase{"block_size", [](auto& o) { o.block_size = 64; }, ""},
        ChangeCase{"segment_size", [](auto& o) { o.segment_size = 512; }, ""},
        ChangeCase{"threshold", [](auto& o) { o.threshold = 0.90000004f; }, ""},
        ChangeCase{"scope", [](auto& o) { o.scope = Scope::kQueryHead; }, ""},
        ChangeCase{"force_first_block", [](auto& o) { o.force_first_block = false; },
                   ""},
        ChangeCase{"dense_fallback", [](auto& o) { o.dense_fallback = true; }, ""},
        ChangeCase{"dense_tail_blocks", [](auto& o) { o.dense_tail_blocks = 1; }, ""},
        ChangeCase{"sink_blocks", [](auto& o) { o.sink_blocks = 1; }, ""},
        ChangeCase{"window_blocks", [](auto& o) { o.window_blocks = 2; }, ""},
        ChangeCase{"mean_correction", [](auto& o) { o.mean_correction = true; }, ""},
        ChangeCase{"as_published", [](auto& o) { o.as_published = true; }, ""},
        ChangeCase{"tenant_salt", [](auto&) {}, "tenant"}),
    testing_support::CaseName());

struct MethodChangeCase {
  const char* name;
  Method method;
  std::function<void(AttentionOptions&)> change;
};

class MethodDigestChangeSpec : public testing::TestWithParam<MethodChangeCase> {};

TEST_P(MethodDigestChangeSpec, EveryOptionOfTheMethodChangesIt) {
  AttentionOptions options = DefaultOptions(GetParam().method);
  const std::string before = SparsityDigest(options, 10'000, "");
  GetParam().change(options);
  EXPECT_NE(SparsityDigest(options, 10'000, ""), before);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, MethodDigestChangeSpec,
    testing::Values(
        MethodChangeCase{"permute", Method::kMeanPooling,
                         [](auto& o) { o.permute = true; }},
        MethodChangeCase{"stride", Method::kXAttention, [](auto& o) { o.stride = 16; }},
        MethodChangeCase{"vertical_tokens", Method::kMInference,
                         [](auto& o) { o.vertical_tokens = 999; }},
        MethodChangeCase{"slash_tokens", Method::kMInference,
                         [](auto& o) { o.slash_tokens = 6095; }},
        MethodChangeCase{"gamma", Method::kFlexPrefill,
                         [](auto& o) { o.gamma = 0.9f; }},
        MethodChangeCase{"tau", Method::kFlexPrefill, [](auto& o) { o.tau = 0; }},
        MethodChangeCase{"fast_threshold", Method::kPrism,
                         [](auto& o) { o.fast_threshold = 0.5f; }},
        MethodChangeCase{"slow_dims", Method::kPrism,
                         [](auto& o) { o.slow_dims = 64; }},
        MethodChangeCase{"fast_dims", Method::kPrism,
                         [](auto& o) { o.fast_dims = 64; }},
        MethodChangeCase{"alpha", Method::kFlashPrefill,
                         [](auto& o) { o.alpha = 0.2f; }}),
    testing_support::CaseName());

TEST(SparsityDigestSpec, ThresholdsOfHeadsChangeIt) {
  const std::string some = ThresholdsDigest(std::vector<float>{0.5f, 1});
  const std::string others = ThresholdsDigest(std::vector<float>{0.5f, 0.75f});
  const std::string digest = SparsityDigest({}, 10'000, "", some);
  EXPECT_EQ(digest.substr(0, 4), "pbs-");
  EXPECT_NE(digest, SparsityDigest({}, 10'000, ""));
  EXPECT_NE(digest, SparsityDigest({}, 10'000, "", others));
  EXPECT_NE(digest, SparsityDigest({.segment_size = 512}, 10'000, "", some));
  EXPECT_NE(digest, SparsityDigest({}, 10'000, "salt", some));
}

TEST(SparsityDigestSpec, ThresholdsOfHeadsAreExactOnlyWhereAnyThresholdIs) {
  const std::string some = ThresholdsDigest(std::vector<float>{0.5f, 1});
  EXPECT_EQ(SparsityDigest({}, 256, "", some), "exact");
  EXPECT_NE(SparsityDigest({.threshold = 1}, 10'000, "", some), "exact");
}

TEST(ThresholdsDigestSpec, IsTheSameInEveryBuild) {
  EXPECT_EQ(ThresholdsDigest(std::vector<float>{0.5f, 1}),
            "aafd837b9504ce803d329e6f51e78eee82bcd1c93c7ae9b18225ce2f49a6a138");
}

TEST(ThresholdsDigestSpec, OneThresholdAndNoOtherAreEqual) {
  EXPECT_TRUE(AreEqual(std::vector<float>{0.5f, 0.5f}));
  EXPECT_FALSE(AreEqual(std::vector<float>{0.5f, 0.6f}));
  EXPECT_FALSE(AreEqual({}));
}

TEST(SparsityDigestSpec, WhatIsOnlyMeasuredDoesNotChangeIt) {
  AttentionOptions options;
  options.coverage_rows = 64;
  EXPECT_EQ(SparsityDigest(options, 10'000, ""), SparsityDigest({}, 10'000, ""));
}

// Checked with Python's hashlib.
TEST(PromptDigestSpec, IsTheSha256OfTheIds) {
  EXPECT_EQ(PromptDigest({}),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  const std::vector<int32_t> prompt = {1, 2, 3};
  EXPECT_EQ(PromptDigest(prompt),
            "sha256:4636993d3e1da4e9d6b8f87b79e8f7c6d018580d52661950eabc3845c5897a4d");
}

}  // namespace
}  // namespace pbs::server
