// Spec: server/model/prefill.h, prefill_plan.h and decode.h. Results against a plain
// f64 transformer (tests/support/reference_model.h).
#include "server/model/prefill.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "pbs/cpu_backend.h"
#include "server/model/decode.h"
#include "server/model/sampling.h"
#include "tests/support/case_name.h"
#include "tests/support/model_folder.h"
#include "tests/support/reference_model.h"

namespace pbs {
namespace {

using testing_support::ReferenceModel;
using testing_support::TempFolder;
using testing_support::TinyModel;
using testing_support::TinyModelSpec;

// |a - b| over max |b|: f32 sums of at most 128 terms, four layers deep.
constexpr double kF32Max = 2e-5;
// K, V, queries and attention outputs rounded once (f16 2^-11, bf16 2^-8), two layers.
constexpr double kF16CacheMax = 4e-3;
constexpr double kBf16CacheMax = 3e-2;
// Every product operand rounded to bf16 as well.
constexpr double kBf16ComputeMax = 4e-2;

constexpr AttentionOptions kDenseOptions = {.method = Method::kDense};

std::unique_ptr<Backend> MakeBackend(
    ComputePreference compute = ComputePreference::kF32) {
  auto backend = CreateCpuBackend({.num_threads = 2, .compute = compute});
  return backend.ok() ? *std::move(backend) : nullptr;
}

std::unique_ptr<Model> LoadTiny(const TinyModel& tiny, Backend& backend,
                                const ModelOptions& options = {}) {
  const TempFolder folder;
  tiny.Write(folder, 2);
  auto model = Model::Load(folder.path(), options, backend);
  EXPECT_TRUE(model.ok()) << model.status().ToString();
  return *std::move(model);
}

std::vector<int32_t> RandomTokens(int32_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 97);
  return tokens;
}

std::vector<int32_t> AllRows(int32_t count) {
  std::vector<int32_t> rows(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) rows[i] = i;
  return rows;
}

// Logs what the observer was told, in order.
class EventLog : public PrefillObserver {
 public:
  void OnKvReady(int32_t layer) override {
    events.push_back("kv " + std::to_string(layer));
    if (on_kv_ready) on_kv_ready(layer);
  }
  void OnLayerDone(const LayerReport& report) override {
    events.push_back("done " + std::to_string(report.layer));
    reports.push_back(report);
  }
  std::vector<std::string> events;
  std::vector<LayerReport> reports;
  std::function<void(int32_t)> on_kv_ready;
};

// One prefill from plan to logits; aborts the test on any error.
struct Prefilled {
  std::vector<std::vector<float>> logits;
  Status status;
};

Prefilled Prefill(const Model& model, const PrefillProblem& problem,
                  std::span<const int32_t> tokens, KvCache& cache,
                  PrefillObserver* observer = nullptr, const RunControl& control = {}) {
  Prefilled result;
  auto plan = PlanPrefill(model, problem);
  if (!plan.ok()) return {{}, plan.status()};
  auto workspace = model.backend().Allocate(plan->workspace_bytes);
  if (!workspace.ok()) return {{}, workspace.status()};
  auto run = PrefillRun::Start(model, *plan, {.tokens = tokens}, cache,
                               workspace->workspace());
  if (!run.ok()) return {{}, run.status()};
  while (!(*run)->layers_done()) {
    result.status = (*run)->RunLayer(observer, control);
    if (!result.status.ok()) return result;
  }
  result.status = (*run)->ComputeLogits();
  for (size_t i = 0; i < plan->problem.logit_rows.size(); ++i) {
    std::vector<float> row(static_cast<size_t>(model.config().vocab_size));
    EXPECT_TRUE((*run)->ReadLogits(static_cast<int32_t>(i), row).ok());
    result.logits.push_back(row);
  }
  return result;
}

KvCache MakeCache(const Model& model, int32_t capacity) {
  return *KvCache::Create(model.kv_shape(capacity), model.backend());
}

template <class Rows>
double Difference(const std::vector<std::vector<float>>& actual, const Rows& expected) {
  double worst = 0;
  double largest = 0;
  EXPECT_EQ(actual.size(), expected.size());
  for (size_t r = 0; r < actual.size(); ++r) {
    for (size_t i = 0; i < actual[r].size(); ++i) {
      worst = std::max(worst, std::abs(double{actual[r][i]} - double{expected[r][i]}));
      largest = std::max(largest, std::abs(double{expected[r][i]}));
    }
  }
  return worst / largest;
}

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
  const auto backend = MakeBackend(GetParam().compute);
  if (backend == nullptr) {
    std::printf("%s NOT RUN (this CPU lacks bf16 products)\n", GetParam().name);
    GTEST_SKIP();
  }
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

// A fixture with one loaded model.
class PrefillRunSpec : public testing::Test {
 protected:
  PrefillRunSpec()
      : backend_(MakeBackend()),
        tiny_({.layers = 3}),
        model_(LoadTiny(tiny_, *backend_)) {}

  std::unique_ptr<Backend> backend_;
  TinyModel tiny_;
  std::unique_ptr<Model> model_;
};

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
  const int32_t count = kRowTile + 77;  // more than one row tile
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
  for (Method method : {Method::kPbs, Method::kMeanPooling}) {
    SCOPED_TRACE(MethodName(method));
    const AttentionOptions options = {
        .method = method, .block_size = 16, .segment_size = 64, .threshold = 1.0f};
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
        PlanCase{"attention_options",
                 {.num_tokens = 5, .attention = {.block_size = 5}},
                 "block_size 5 is not a power of two in [16, 256]"}),
    testing_support::CaseName());

TEST_F(PrefillRunSpec, PlansMemoryByPart) {
  const auto plan =
      PlanPrefill(*model_, {.num_tokens = 100, .attention = kDenseOptions});
  ASSERT_TRUE(plan.ok());
  const PrefillMemory& memory = plan->memory;
  const auto align = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
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

TEST_F(PrefillRunSpec, BoundsRowTilesHoweverLongThePrompt) {
  const auto small =
      PlanPrefill(*model_, {.num_tokens = kRowTile, .attention = kDenseOptions});
  const auto large =
      PlanPrefill(*model_, {.num_tokens = 4 * kRowTile, .attention = kDenseOptions});
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
