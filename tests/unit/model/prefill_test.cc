// Spec: server/model/prefill.h and decode.h. Results against a plain f64 transformer
// (tests/support/reference_model.h).
#include "server/model/prefill.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <ostream>
#include <span>
#include <utility>
#include <vector>

#include "server/model/decode.h"
#include "server/model/sampling.h"
#include "tests/support/case_name.h"
#include "tests/unit/model/tiny_prefill.h"

namespace pbs {
namespace {

using namespace tiny_prefill;  // NOLINT

struct FamilyCase {
  const char* name;
  TinyModelSpec spec;
};

void PrintTo(const FamilyCase& c, std::ostream* out) { *out << c.name; }

class FamilySpec : public testing::TestWithParam<FamilyCase> {};

TEST_P(FamilySpec, EqualsAPlainTransformer) {
  const auto backend = MakeBackend();
  const TinyModel tiny(GetParam().spec);
  const auto model = LoadTiny(tiny, *backend);
  for (int32_t count : {1, 2, 37}) {
    SCOPED_TRACE(count);
    const auto tokens = RandomTokens(count, 5);
    KvCache cache = MakeCache(*model, count);
    const Prefilled result = Prefill(
        *model,
        {.num_tokens = count, .attention = kDenseOptions, .logit_rows = AllRows(count)},
        tokens, cache);
    ASSERT_TRUE(result.status.ok()) << result.status.ToString();
    EXPECT_LE(Difference(result.logits, ReferenceModel(tiny).Logits(tokens)), kF32Max);
    EXPECT_EQ(cache.num_tokens(), count);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, FamilySpec,
    testing::Values(
        FamilyCase{"llama", {}}, FamilyCase{"llama_tied", {.tied = true}},
        FamilyCase{"llama_biases", {.attention_bias = true, .mlp_bias = true}},
        FamilyCase{"llama_four_layers", {.layers = 4}},
        FamilyCase{"llama_odd_sizes",
                   {.hidden = 37, .inner = 53, .heads = 3, .kv_heads = 3}},
        FamilyCase{"llama_wide_heads", {.head_dim = 96}},
        FamilyCase{"llama_bf16", {.dtype = DType::kBF16}},
        FamilyCase{"llama_f16", {.dtype = DType::kF16}},
        FamilyCase{"qwen2", {.model_type = "qwen2"}},
        FamilyCase{"qwen3", {.model_type = "qwen3", .tied = true}},
        FamilyCase{"qwen3_biases", {.model_type = "qwen3", .attention_bias = true}},
        FamilyCase{"mistral_one_kv_head", {.model_type = "mistral", .kv_heads = 1}}),
    testing_support::CaseName());

TEST(PrefillSpec, MixedStoredDTypesAreWidenedToTheirCommonOne) {
  const auto backend = MakeBackend();
  TinyModel tiny({.dtype = DType::kBF16});
  tiny.tensors["model.layers.0.self_attn.k_proj.weight"].dtype = DType::kF32;
  tiny.tensors["model.layers.1.mlp.up_proj.weight"].dtype = DType::kF32;
  const auto model = LoadTiny(tiny, *backend);
  const auto tokens = RandomTokens(20, 1);
  KvCache cache = MakeCache(*model, 20);
  const Prefilled result =
      Prefill(*model, {.num_tokens = 20, .attention = kDenseOptions}, tokens, cache);
  const auto expected = ReferenceModel(tiny).Logits(tokens);
  EXPECT_LE(Difference(result.logits, ReferenceModel::Rows{expected.back()}), kF32Max);
}

struct PrecisionCase {
  const char* name;
  ComputePreference compute;
  std::optional<DType> kv_dtype;
  double tolerance;
};

void PrintTo(const PrecisionCase& c, std::ostream* out) { *out << c.name; }

class PrecisionSpec : public testing::TestWithParam<PrecisionCase> {};

TEST_P(PrecisionSpec, CostsItsRoundingOnly) {
  auto created = CreateCpuBackend({.num_threads = 2, .compute = GetParam().compute});
  if (created.status().code() == StatusCode::kFailedPrecondition) {
    GTEST_SKIP() << "NOT RUN: " << created.status().message();
  }
  ASSERT_TRUE(created.ok()) << created.status().ToString();
  const auto backend = *std::move(created);
  const TinyModel tiny({.model_type = "qwen3", .dtype = DType::kBF16});
  const auto model = LoadTiny(tiny, *backend, {.kv_dtype = GetParam().kv_dtype});
  const auto tokens = RandomTokens(60, 5);
  KvCache cache = MakeCache(*model, 60);
  const Prefilled result = Prefill(
      *model, {.num_tokens = 60, .attention = kDenseOptions, .logit_rows = AllRows(60)},
      tokens, cache);
  ASSERT_TRUE(result.status.ok()) << result.status.ToString();
  EXPECT_LE(Difference(result.logits, ReferenceModel(tiny).Logits(tokens)),
            GetParam().tolerance);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PrecisionSpec,
    testing::Values(
        PrecisionCase{"f16_cache", ComputePreference::kF32, DType::kF16, kF16CacheMax},
        PrecisionCase{"bf16_cache", ComputePreference::kF32, DType::kBF16,
                      kBf16CacheMax},
        PrecisionCase{"bf16_compute", ComputePreference::kBf16, {}, kBf16ComputeMax},
        PrecisionCase{"bf16_compute_f32_cache", ComputePreference::kBf16, DType::kF32,
                      kBf16ComputeMax}),
    testing_support::CaseName());

TEST_F(PrefillRunSpec, TellsOfEachLayersKeysBeforeTheLayerIsDone) {
  const auto tokens = RandomTokens(10, 1);
  KvCache cache = MakeCache(*model_, 10);
  EventLog log;
  ASSERT_TRUE(Prefill(*model_, {.num_tokens = 10, .attention = kDenseOptions}, tokens,
                      cache, &log)
                  .status.ok());
  EXPECT_EQ(log.events, (std::vector<std::string>{"kv 0", "done 0", "kv 1", "done 1",
                                                  "kv 2", "done 2"}));
  for (const LayerReport& report : log.reports) {
    EXPECT_EQ(report.attention.Density(), 1.0);
    EXPECT_GE(report.seconds, report.qkv_seconds + report.mlp_seconds);
  }
}

TEST_F(PrefillRunSpec, HasTheLayersKeysAndValuesInTheCacheWhenItSaysSo) {
  const auto tokens = RandomTokens(10, 1);
  KvCache whole = MakeCache(*model_, 10);
  ASSERT_TRUE(
      Prefill(*model_, {.num_tokens = 10, .attention = kDenseOptions}, tokens, whole)
          .status.ok());
  KvCache cache = MakeCache(*model_, 10);
  EventLog log;
  log.on_kv_ready = [&](int32_t layer) {
    const auto bytes = static_cast<size_t>(cache.shape().plane_bytes());
    EXPECT_EQ(std::memcmp(cache.k(layer), whole.k(layer), bytes), 0) << layer;
    EXPECT_EQ(std::memcmp(cache.v(layer), whole.v(layer), bytes), 0) << layer;
  };
  ASSERT_TRUE(Prefill(*model_, {.num_tokens = 10, .attention = kDenseOptions}, tokens,
                      cache, &log)
                  .status.ok());
  EXPECT_EQ(log.reports.size(), 3u);
}

TEST_F(PrefillRunSpec, GivesLogitsOfAnyRowsInTheOrderAskedFor) {
  const auto tokens = RandomTokens(30, 2);
  KvCache cache = MakeCache(*model_, 64);  // room to spare
  const Prefilled result = Prefill(
      *model_,
      {.num_tokens = 30, .attention = kDenseOptions, .logit_rows = {29, 0, 13, 0}},
      tokens, cache);
  const auto expected = ReferenceModel(tiny_).Logits(tokens);
  EXPECT_LE(Difference(result.logits, ReferenceModel::Rows{expected[29], expected[0],
                                                           expected[13], expected[0]}),
            kF32Max);
}

TEST_F(PrefillRunSpec, ContinuesACacheAsIfItHadBeenOnePrompt) {
  const auto tokens = RandomTokens(41, 3);
  const auto expected = ReferenceModel(tiny_).Logits(tokens);
  for (int32_t split : {1, 17, 40}) {
    SCOPED_TRACE(split);
    KvCache cache = MakeCache(*model_, 41);
    const std::span<const int32_t> all(tokens);
    ASSERT_TRUE(Prefill(*model_, {.num_tokens = split, .attention = kDenseOptions},
                        all.first(split), cache)
                    .status.ok());
    EXPECT_EQ(cache.num_tokens(), split);
    const Prefilled rest = Prefill(*model_,
                                   {.num_tokens = 41 - split,
                                    .past_len = split,
                                    .attention = kDenseOptions,
                                    .logit_rows = AllRows(41 - split)},
                                   all.subspan(split), cache);
    ASSERT_TRUE(rest.status.ok()) << rest.status.ToString();
    EXPECT_LE(Difference(rest.logits, ReferenceModel::Rows(expected.begin() + split,
                                                           expected.end())),
              kF32Max);
    EXPECT_EQ(cache.num_tokens(), 41);
  }
}

TEST_F(PrefillRunSpec, MayStartOverOnAShorterPast) {
  const auto tokens = RandomTokens(20, 4);
  KvCache cache = MakeCache(*model_, 20);
  const std::span<const int32_t> all(tokens);
  ASSERT_TRUE(
      Prefill(*model_, {.num_tokens = 20, .attention = kDenseOptions}, all, cache)
          .status.ok());
  const Prefilled again =
      Prefill(*model_, {.num_tokens = 5, .past_len = 15, .attention = kDenseOptions},
              all.subspan(15), cache);
  const auto expected = ReferenceModel(tiny_).Logits(tokens);
  EXPECT_LE(Difference(again.logits, ReferenceModel::Rows{expected.back()}), kF32Max);
}

TEST_F(PrefillRunSpec, RunsEqualBitsTwiceAndInTiles) {
  const int32_t count = backend_->info().row_tile + 77;  // more than one row tile
  const auto tokens = RandomTokens(count, 5);
  std::vector<std::vector<float>> first;
  for (int round = 0; round < 2; ++round) {
    KvCache cache = MakeCache(*model_, count);
    const Prefilled result = Prefill(
        *model_, {.num_tokens = count, .attention = kDenseOptions}, tokens, cache);
    ASSERT_TRUE(result.status.ok());
    if (round == 0) first = result.logits;
    EXPECT_EQ(result.logits, first);
  }
  // The same prompt in two runs crosses tiles elsewhere.
  KvCache cache = MakeCache(*model_, count);
  const std::span<const int32_t> all(tokens);
  ASSERT_TRUE(Prefill(*model_, {.num_tokens = 500, .attention = kDenseOptions},
                      all.first(500), cache)
                  .status.ok());
  const Prefilled rest = Prefill(
      *model_, {.num_tokens = count - 500, .past_len = 500, .attention = kDenseOptions},
      all.subspan(500), cache);
  EXPECT_LE(Difference(rest.logits, first), kF32Max);
}

TEST_F(PrefillRunSpec, RunsSparseMethodsWhichEqualDenseAtAThresholdOfOne) {
  const auto tokens = RandomTokens(300, 6);
  KvCache cache = MakeCache(*model_, 300);
  const Prefilled dense =
      Prefill(*model_, {.num_tokens = 300, .attention = kDenseOptions}, tokens, cache);
  for (Method method :
       {Method::kPbs, Method::kMeanPooling, Method::kXAttention, Method::kPrism}) {
    SCOPED_TRACE(MethodName(method));
    AttentionOptions options = DefaultOptions(method);
    options.block_size = 16;
    options.threshold = 1.0f;
    if (Permutes(options)) options.segment_size = 64;
    const Prefilled all =
        Prefill(*model_, {.num_tokens = 300, .attention = options}, tokens, cache);
    ASSERT_TRUE(all.status.ok()) << all.status.ToString();
    EXPECT_LE(Difference(all.logits, dense.logits), kF32Max);
    AttentionOptions sparse = options;
    sparse.threshold = 0.3f;
    EventLog log;
    const Prefilled some =
        Prefill(*model_, {.num_tokens = 300, .attention = sparse}, tokens, cache, &log);
    ASSERT_TRUE(some.status.ok()) << some.status.ToString();
    EXPECT_LT(log.reports[1].attention.Density(), 0.9);
    EXPECT_EQ(log.reports[1].attention.method_run, method);
  }
}

TEST_F(PrefillRunSpec, SeveralPromptsRunAsOneAsEachWouldAlone) {
  const std::vector<int32_t> lengths = {37, 1, 200, 64};
  const AttentionOptions sparse = {
      .method = Method::kPbs, .block_size = 16, .segment_size = 32, .threshold = 0.5f};
  for (const AttentionOptions& attention : {kDenseOptions, sparse}) {
    SCOPED_TRACE(MethodName(attention.method));
    PrefillProblem problem = {
        .num_tokens = 302, .attention = attention, .prompt_tokens = lengths};
    problem.logit_rows = AllRows(302);
    const auto tokens = RandomTokens(302, 8);
    KvCache cache = MakeCache(*model_, 310);
    const Prefilled together = Prefill(*model_, problem, tokens, cache);
    ASSERT_TRUE(together.status.ok()) << together.status.ToString();
    auto first = together.logits.begin();
    int32_t begin = 0;
    for (int32_t length : lengths) {
      SCOPED_TRACE(length);
      KvCache own = MakeCache(*model_, length);
      const Prefilled alone = Prefill(
          *model_,
          {.num_tokens = length, .attention = attention, .logit_rows = AllRows(length)},
          std::span(tokens).subspan(begin, length), own);
      const std::vector<std::vector<float>> rows(first, first + length);
      EXPECT_LE(Difference(rows, alone.logits), kF32Max);
      const auto* keys = static_cast<const float*>(cache.k(2)) + begin * 32;
      const auto* own_keys = static_cast<const float*>(own.k(2));
      for (int i = 0; i < length * 32; ++i) ASSERT_NEAR(keys[i], own_keys[i], 1e-4);
      first += length;
      begin += length;
    }
  }
}

TEST_F(PrefillRunSpec, TakesTheCallersBlockLists) {
  const auto tokens = RandomTokens(64, 7);
  const AttentionOptions options = {
      .method = Method::kMeanPooling, .block_size = 16, .use_given_lists = true};
  const auto plan = PlanPrefill(*model_, {.num_tokens = 64, .attention = options});
  ASSERT_TRUE(plan.ok());
  // Every query block reads itself only.
  BlockLists lists;
  for (int head = 0; head < 4; ++head) {
    for (uint16_t block = 0; block < 4; ++block) {
      lists.begin.push_back(static_cast<int64_t>(lists.indices.size()));
      lists.count.push_back(1);
      lists.num_masked.push_back(1);
      lists.indices.push_back(block);
    }
  }
  ASSERT_TRUE(ValidateLists(plan->attention->geometry, {}, lists.View()).ok());
  auto workspace = backend_->Allocate(plan->workspace_bytes);
  KvCache cache = MakeCache(*model_, 64);
  auto run =
      PrefillRun::Start(*model_, *plan, {.tokens = tokens, .lists = lists.View()},
                        cache, workspace->workspace());
  ASSERT_TRUE(run.ok());
  EventLog log;
  ASSERT_TRUE((*run)->RunLayer(&log, {}).ok());
  EXPECT_EQ(log.reports[0].attention.executed_blocks, 4 * 4);
}

TEST_F(PrefillRunSpec, StopsBetweenLayersAndLeavesTheCacheItsPast) {
  const auto tokens = RandomTokens(20, 8);
  KvCache cache = MakeCache(*model_, 40);
  ASSERT_TRUE(
      Prefill(*model_, {.num_tokens = 20, .attention = kDenseOptions}, tokens, cache)
          .status.ok());
  std::atomic<bool> stop = false;
  EventLog log;
  log.on_kv_ready = [&](int32_t layer) {
    if (layer == 1) stop = true;
  };
  const Prefilled stopped =
      Prefill(*model_, {.num_tokens = 20, .past_len = 20, .attention = kDenseOptions},
              tokens, cache, &log, {.stop = &stop});
  EXPECT_EQ(stopped.status.code(), StatusCode::kCancelled);
  EXPECT_EQ(log.events, (std::vector<std::string>{"kv 0", "done 0", "kv 1"}));
  EXPECT_EQ(cache.num_tokens(), 20);
}

TEST_F(PrefillRunSpec, StoppedOnAShorterPastTheCacheHoldsThatPastAlone) {
  const auto tokens = RandomTokens(20, 4);
  KvCache cache = MakeCache(*model_, 20);
  ASSERT_TRUE(
      Prefill(*model_, {.num_tokens = 20, .attention = kDenseOptions}, tokens, cache)
          .status.ok());
  std::atomic<bool> stop = false;
  EventLog log;
  log.on_kv_ready = [&](int32_t) { stop = true; };
  const Prefilled stopped = Prefill(
      *model_, {.num_tokens = 5, .past_len = 5, .attention = kDenseOptions},
      std::span<const int32_t>(tokens).subspan(5, 5), cache, &log, {.stop = &stop});
  EXPECT_EQ(stopped.status.code(), StatusCode::kCancelled);
  EXPECT_EQ(cache.num_tokens(), 5);
}

TEST_F(PrefillRunSpec, SaysInWhichLayerItWasStopped) {
  const auto tokens = RandomTokens(20, 8);
  KvCache cache = MakeCache(*model_, 20);
  const std::atomic<bool> stop = true;
  EXPECT_EQ(Prefill(*model_, {.num_tokens = 20, .attention = kDenseOptions}, tokens,
                    cache, nullptr, {.stop = &stop})
                .status.ToString(),
            "CANCELLED: prefill stopped in layer 0 of 3");
}

TEST_F(PrefillRunSpec, DecodesAsAPrefillOfTheLongerPromptWould) {
  std::vector<int32_t> tokens = RandomTokens(25, 9);
  KvCache cache = MakeCache(*model_, 40);
  Prefilled last =
      Prefill(*model_, {.num_tokens = 25, .attention = kDenseOptions}, tokens, cache);
  auto decoder = Decoder::Create(*model_, cache);
  ASSERT_TRUE(decoder.ok());
  std::vector<float> logits = last.logits[0];
  for (int step = 0; step < 10; ++step) {
    tokens.push_back(Argmax(logits));
    const auto next = (*decoder)->Step(tokens.back());
    ASSERT_TRUE(next.ok()) << next.status().ToString();
    logits.assign(next->begin(), next->end());
    const auto expected = ReferenceModel(tiny_).Logits(tokens);
    EXPECT_LE(Difference({logits}, ReferenceModel::Rows{expected.back()}), kF32Max);
    EXPECT_EQ(cache.num_tokens(), 26 + step);
  }
}

TEST_F(PrefillRunSpec, DecodesUpToTheCachesCapacityAndNoFurther) {
  const auto tokens = RandomTokens(7, 9);
  KvCache cache = MakeCache(*model_, 8);
  ASSERT_TRUE(
      Prefill(*model_, {.num_tokens = 7, .attention = kDenseOptions}, tokens, cache)
          .status.ok());
  auto decoder = Decoder::Create(*model_, cache);
  ASSERT_TRUE(decoder.ok());
  EXPECT_EQ((*decoder)->Step(97).status().message(),
            "the token at position 0 is outside [0, 96]");
  EXPECT_TRUE((*decoder)->Step(1).ok());
  EXPECT_EQ((*decoder)->Step(1).status().message(),
            "past_len + num_tokens 9 exceeds the KV cache's capacity 8");
  EXPECT_EQ(cache.num_tokens(), 8);
}

}  // namespace
}  // namespace pbs
