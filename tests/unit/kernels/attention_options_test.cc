// Spec: kernels/include/pbs/attention_options.h. The tables of methods and options.
#include "pbs/attention_options.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <set>
#include <string>
#include <variant>

#include "tests/support/case_name.h"

namespace pbs {
namespace {

TEST(MethodTableSpec, HasEveryMethodInTheOrderOfTheProtocolWithANameOfItsOwn) {
  std::set<std::string> names;
  for (size_t i = 0; i < kMethods.size(); ++i) {
    EXPECT_EQ(static_cast<size_t>(kMethods[i]), i);
    const MethodTraits& traits = TraitsOf(kMethods[i]);
    EXPECT_EQ(traits.method, kMethods[i]);
    EXPECT_TRUE(names.insert(traits.name).second) << traits.name;
    EXPECT_EQ(FindMethod(traits.name), &traits);
    EXPECT_EQ(traits.Selects(), traits.scorer != Scorer::kNone) << traits.name;
  }
  EXPECT_EQ(FindMethod("flash"), nullptr);
  EXPECT_EQ(FindMethod(""), nullptr);
}

TEST(OptionTableSpec, HasABitAndANamePerOption) {
  OptionSet seen = 0;
  std::set<std::string> names;
  for (const OptionTraits& option : AllOptions()) {
    EXPECT_EQ(option.bit, seen + 1) << option.name;  // the next bit
    seen |= option.bit;
    EXPECT_TRUE(names.insert(option.name).second) << option.name;
    EXPECT_EQ(FindOption(option.name), &option);
  }
  OptionSet used = 0;
  for (Method method : kMethods) used |= TraitsOf(method).options;
  EXPECT_EQ(FindOption("method"), nullptr);
  for (const OptionTraits& option : AllOptions()) {
    // Given orders and their scope come with `permute`, which some methods always do.
    EXPECT_NE(MethodsWith(option.bit), "") << option.name;
    EXPECT_NE(used & option.bit, 0u) << option.name;
  }
}

// An option without a row would be neither validated nor part of a digest.
TEST(OptionTableSpec, HasEveryFieldOfTheStruct) {
  AttentionOptions changed;
  for (const OptionTraits& option : AllOptions()) {
    std::visit(
        [&](auto field) {
          using Value = std::decay_t<decltype(changed.*field)>;
          changed.*field = static_cast<Value>(1 - static_cast<int>(changed.*field));
        },
        option.field);
  }
  changed.method = Method::kDense;
  const auto [method, block_size, segment_size, threshold, scope, first, order, lists,
              fallback, coverage, permute, tail, sink, window, means, published, least,
              stride, vertical, slash, gamma, tau, fast, slow_dims, fast_dims, alpha] =
      changed;
  const AttentionOptions d;
  EXPECT_NE(method, d.method);
  EXPECT_NE(block_size, d.block_size);
  EXPECT_NE(segment_size, d.segment_size);
  EXPECT_NE(threshold, d.threshold);
  EXPECT_NE(scope, d.scope);
  EXPECT_NE(first, d.force_first_block);
  EXPECT_NE(order, d.use_given_order);
  EXPECT_NE(lists, d.use_given_lists);
  EXPECT_NE(fallback, d.dense_fallback);
  EXPECT_NE(coverage, d.coverage_rows);
  EXPECT_NE(permute, d.permute);
  EXPECT_NE(tail, d.dense_tail_blocks);
  EXPECT_NE(sink, d.sink_blocks);
  EXPECT_NE(window, d.window_blocks);
  EXPECT_NE(means, d.mean_correction);
  EXPECT_NE(published, d.as_published);
  EXPECT_NE(least, d.coverage_min);
  EXPECT_NE(stride, d.stride);
  EXPECT_NE(vertical, d.vertical_tokens);
  EXPECT_NE(slash, d.slash_tokens);
  EXPECT_NE(gamma, d.gamma);
  EXPECT_NE(tau, d.tau);
  EXPECT_NE(fast, d.fast_threshold);
  EXPECT_NE(slow_dims, d.slow_dims);
  EXPECT_NE(fast_dims, d.fast_dims);
  EXPECT_NE(alpha, d.alpha);
}

TEST(DefaultOptionsSpec, AreValidForEveryMethod) {
  for (Method method : kMethods) {
    for (const bool as_published : {false, true}) {
      if (as_published && !TraitsOf(method).Selects()) continue;
      const AttentionOptions options = DefaultOptions(method, as_published);
      EXPECT_EQ(options.method, method);
      EXPECT_EQ(ValidateOptions(options).message(), "");
    }
  }
}

TEST(DefaultOptionsSpec, AsPublishedAreThoseOfThePublishedCode) {
  EXPECT_EQ(DefaultOptions(Method::kPbs, true).scope, Scope::kQueryHead);
  EXPECT_EQ(DefaultOptions(Method::kPrism, true).threshold, 0.95f);
  const AttentionOptions flash = DefaultOptions(Method::kFlashPrefill, true);
  EXPECT_EQ(flash.sink_blocks, 2);
  EXPECT_EQ(flash.window_blocks, 4);
  EXPECT_EQ(flash.dense_tail_blocks, 2);
  EXPECT_TRUE(flash.as_published);
}

struct TextCase {
  const char* name;
  AttentionOptions options;
  const char* text;
};

class CanonicalTextSpec : public testing::TestWithParam<TextCase> {};

TEST_P(CanonicalTextSpec, HasEveryOptionThatDecidesTheResult) {
  EXPECT_EQ(CanonicalText(GetParam().options), GetParam().text);
}

// Digests are hashes of these texts, and caches are looked up by them: they never
// change.
INSTANTIATE_TEST_SUITE_P(
    Cases, CanonicalTextSpec,
    testing::Values(
        TextCase{"pbs",
                 {},
                 "pbs block_size=128 threshold=0.899999976 force_first_block=1 "
                 "dense_fallback=0 segment_size=256 scope=kv_head"},
        TextCase{"pbs_changed",
                 {.block_size = 64,
                  .segment_size = 512,
                  .threshold = 0.5f,
                  .scope = Scope::kQueryHead,
                  .force_first_block = false,
                  .dense_fallback = true},
                 "pbs block_size=64 threshold=0.5 force_first_block=0 "
                 "dense_fallback=1 segment_size=512 scope=query_head"},
        TextCase{"mean_pooling",
                 {.method = Method::kMeanPooling},
                 "mean_pooling block_size=128 threshold=0.899999976 "
                 "force_first_block=1 dense_fallback=0"},
        TextCase{"measured_or_given_is_not_decided",
                 {.use_given_order = true, .use_given_lists = true, .coverage_rows = 9},
                 "pbs block_size=128 threshold=0.899999976 force_first_block=1 "
                 "dense_fallback=0 segment_size=256 scope=kv_head"},
        TextCase{"mean_pooling_permuted",
                 {.method = Method::kMeanPooling, .permute = true},
                 "mean_pooling block_size=128 threshold=0.899999976 "
                 "force_first_block=1 dense_fallback=0 segment_size=256 scope=kv_head "
                 "permute=1"},
        TextCase{"pbs_forced_blocks",
                 {.dense_tail_blocks = 1,
                  .sink_blocks = 2,
                  .window_blocks = 3,
                  .mean_correction = true,
                  .as_published = true},
                 "pbs block_size=128 threshold=0.899999976 force_first_block=1 "
                 "dense_fallback=0 segment_size=256 scope=kv_head dense_tail_blocks=1 "
                 "sink_blocks=2 window_blocks=3 mean_correction=1 as_published=1"},
        TextCase{"xattention", DefaultOptions(Method::kXAttention),
                 "xattention block_size=128 threshold=0.899999976 force_first_block=1 "
                 "dense_fallback=0 stride=8"},
        TextCase{"minference", DefaultOptions(Method::kMInference),
                 "minference block_size=128 dense_fallback=0 vertical_tokens=1000 "
                 "slash_tokens=6096"},
        TextCase{"flexprefill", DefaultOptions(Method::kFlexPrefill),
                 "flexprefill block_size=128 force_first_block=1 dense_fallback=0 "
                 "gamma=0.949999988 tau=0.100000001"},
        TextCase{"prism", DefaultOptions(Method::kPrism),
                 "prism block_size=128 threshold=0.949999988 force_first_block=1 "
                 "dense_fallback=0 fast_threshold=0 slow_dims=0 fast_dims=0"},
        TextCase{"flashprefill", DefaultOptions(Method::kFlashPrefill),
                 "flashprefill block_size=128 dense_fallback=0 alpha=0.100000001"}),
    testing_support::CaseName());

struct EveryCase {
  const char* name;
  AttentionOptions options;
  bool every;
};

class SelectsEveryBlockSpec : public testing::TestWithParam<EveryCase> {};

TEST_P(SelectsEveryBlockSpec, FollowsFromTheOptionsAlone) {
  EXPECT_EQ(SelectsEveryBlock(GetParam().options), GetParam().every);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, SelectsEveryBlockSpec,
    testing::Values(EveryCase{"dense", {.method = Method::kDense}, true},
                    EveryCase{"pbs", {}, false},
                    EveryCase{"pbs_threshold_one", {.threshold = 1}, true},
                    EveryCase{"flexprefill_gamma_one",
                              {.method = Method::kFlexPrefill, .gamma = 1},
                              true},
                    EveryCase{"flexprefill", {.method = Method::kFlexPrefill}, false},
                    EveryCase{"flashprefill_alpha_one",
                              {.method = Method::kFlashPrefill, .alpha = 1},
                              false}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs
