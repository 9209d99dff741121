// Spec: kernels/include/pbs/cuda_backend.h, the whole backend over an emulated device:
// memory, copies, linear layers, models, and what happens when the device breaks.
#include "cuda/backend/cuda_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulator/emulated_driver.h"
#include "reference/reference_attention.h"
#include "tests/support/case_name.h"
#include "tests/support/linear_layer_case.h"
#include "tests/unit/model/tiny_prefill.h"

namespace pbs::emulator {
namespace {

using cuda::StagingRing;
using testing::HasSubstr;
using testing_support::LinearCase;
using namespace tiny_prefill;  // NOLINT

struct EmulatedDevice {
  explicit EmulatedDevice(const EmulatedOptions& options = {}) {
    auto made = std::make_unique<EmulatedDriver>(options);
    driver = made.get();
    auto created = cuda::CudaBackend::Create(std::move(made));
    EXPECT_TRUE(created.ok()) << created.status().ToString();
    backend = *std::move(created);
  }

  EmulatedDriver* driver = nullptr;  // the backend's
  std::unique_ptr<cuda::CudaBackend> backend;
};

TEST(CudaBackendSpec, AllocatesZeroedMemoryAndGivesItBack) {
  EmulatedDevice device;
  const int64_t before = device.driver->bytes_held();
  {
    auto buffer = device.backend->Allocate(1000);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % kMemoryAlignment, 0u);
    std::vector<char> bytes(1000, 'x');
    ASSERT_TRUE(device.backend->Download(buffer->data(), bytes.data(), 1000).ok());
    EXPECT_EQ(std::accumulate(bytes.begin(), bytes.end(), 0), 0);
    EXPECT_EQ(device.driver->bytes_held(), before + 1000);
  }
  EXPECT_EQ(device.driver->bytes_held(), before);
  EXPECT_EQ(device.backend->Allocate(0)->data(), nullptr);
}

TEST(CudaBackendSpec, RefusesMoreMemoryThanThereIsAndGoesOn) {
  EmulatedDevice device({.memory_bytes = 1 << 20});
  const auto refused = device.backend->Allocate(2 << 20);
  EXPECT_EQ(refused.status().code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(device.backend->Health().ok());
  EXPECT_TRUE(device.backend->Allocate(1 << 19).ok());
}

TEST(CudaBackendSpec, CopiesAnySizeAndLetsTheSourceGo) {
  constexpr int64_t kPiece = StagingRing::kPieceBytes;
  for (uint32_t seed : {1u, 2u, 3u}) {
    EmulatedDevice device({.seed = seed});
    for (int64_t bytes : {int64_t{1}, kPiece - 1, kPiece, kPiece + 1, 5 * kPiece + 7}) {
      SCOPED_TRACE(testing::Message() << "seed " << seed << " bytes " << bytes);
      auto buffer = device.backend->Allocate(bytes);
      ASSERT_TRUE(buffer.ok());
      std::mt19937 random(seed);
      std::vector<uint8_t> expected(static_cast<size_t>(bytes));
      for (uint8_t& byte : expected) byte = static_cast<uint8_t>(random());
      std::vector<uint8_t> source = expected;
      ASSERT_TRUE(device.backend->Upload(source.data(), buffer->data(), bytes).ok());
      source.assign(source.size(), 0);
      std::vector<uint8_t> actual(expected.size());
      ASSERT_TRUE(device.backend->Download(buffer->data(), actual.data(), bytes).ok());
      EXPECT_TRUE(actual == expected);
    }
  }
}

// An upload that is asked for behind work that has not been done yet.
TEST(CudaBackendSpec, WhatWasCalledBeforeDoesNotTouchWhatIsUploadedLater) {
  constexpr int64_t kBytes = 1 << 20;
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(seed);
    EmulatedDevice device({.seed = seed});
    const std::vector<uint8_t> expected(kBytes, 0x5A);
    // Both clear memory and give it up, for the next one to use.
    ASSERT_TRUE(device.backend->Allocate(kBytes).ok());
    auto earlier = device.backend->Allocate(kBytes);
    ASSERT_TRUE(earlier.ok());
    auto buffer = device.backend->AllocateForUpload(kBytes);
    ASSERT_TRUE(buffer.ok());
    std::promise<Status> done;
    device.backend->UploadLater(expected.data(), buffer->data(), kBytes,
                                [&](const Status& status) { done.set_value(status); });
    ASSERT_TRUE(done.get_future().get().ok());
    std::vector<uint8_t> actual(kBytes);
    ASSERT_TRUE(device.backend->Download(buffer->data(), actual.data(), kBytes).ok());
    EXPECT_TRUE(actual == expected);
  }
}

TEST(CudaBackendSpec, CopiesTakeNoMemoryBeyondTheirRings) {
  constexpr int64_t kReportSlots = 2 * 4096;
  EmulatedDevice device;
  constexpr int64_t kBytes = 3 * StagingRing::kPieceBytes;
  const auto buffer = device.backend->AllocateForUpload(kBytes);
  ASSERT_TRUE(buffer.ok());
  const int64_t before = device.driver->bytes_held();
  constexpr int kRings = 3;
  EXPECT_EQ(before, kBytes +
                        kRings * StagingRing::kNumPieces * StagingRing::kPieceBytes +
                        kReportSlots);
  std::vector<char> host(kBytes, 'x');
  for (int i = 0; i < 3; ++i) {
    std::promise<Status> up, down;
    device.backend->UploadLater(host.data(), buffer->data(), kBytes,
                                [&](const Status& status) { up.set_value(status); });
    EXPECT_TRUE(up.get_future().get().ok());
    device.backend->DownloadLater(
        buffer->data(), host.data(), kBytes,
        [&](const Status& status) { down.set_value(status); });
    EXPECT_TRUE(down.get_future().get().ok());
    EXPECT_EQ(device.driver->bytes_held(), before);
  }
}

TEST(CudaBackendSpec, MemoryForAnUploadThatNeverCameIsGivenBack) {
  EmulatedDevice device({.memory_bytes = 1 << 20});
  const int64_t before = device.driver->bytes_held();
  for (int i = 0; i < 5; ++i) {
    const auto buffer = device.backend->AllocateForUpload(1 << 20);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ(device.backend->AllocateForUpload(1).status().code(),
              StatusCode::kResourceExhausted);
  }
  EXPECT_EQ(device.driver->bytes_held(), before);
  EXPECT_EQ(device.backend->AllocateForUpload(0)->data(), nullptr);
}

class CudaLinearSpec : public testing::TestWithParam<LinearCase> {};

TEST_P(CudaLinearSpec, EqualsPlainLoops) {
  EmulatedDevice device;
  const DType compute = device.backend->ComputeDType(GetParam().weights);
  for (int64_t rows : {1, 9}) {
    CheckLayer(*device.backend, GetParam(), compute, rows, /*rounds_gates=*/true);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CudaLinearSpec,
    testing::Values(
        LinearCase{"bf16", 64, 40, DType::kBF16},
        LinearCase{"bf16_without_bias", 64, 40, DType::kBF16, LinearEpilogue::kStore,
                   false},
        LinearCase{"f16", 72, 64, DType::kF16},
        LinearCase{"bf16_residual", 96, 104, DType::kBF16, LinearEpilogue::kAdd},
        LinearCase{"f16_residual", 96, 104, DType::kF16, LinearEpilogue::kAdd, false},
        LinearCase{"bf16_gated", 64, 144, DType::kBF16, LinearEpilogue::kSwiGlu},
        LinearCase{"f16_gated", 40, 144, DType::kF16, LinearEpilogue::kSwiGlu, false}),
    testing_support::CaseName());

TEST(CudaLinearSpec, RefusesWhatItCannotMultiplyAndASmallWorkspace) {
  EmulatedDevice device;
  const RowReader zeros = [](int64_t, int64_t count, void* rows) {
    std::fill_n(static_cast<uint16_t*>(rows), count * 64, uint16_t{0});
    return OkStatus();
  };
  LinearSpec spec = {.in_features = 64,
                     .out_features = 64,
                     .weight_dtype = DType::kBF16,
                     .compute_dtype = DType::kBF16,
                     .x_stride = 64,
                     .y_stride = 64};
  const auto linear = device.backend->PackLinear(spec, zeros, {});
  ASSERT_TRUE(linear.ok()) << linear.status().ToString();
  EXPECT_EQ((*linear)->bytes, 64 * 64 * 2);
  const Status small = device.backend->Linear(**linear, nullptr, 1, nullptr, {});
  EXPECT_EQ(small.code(), StatusCode::kResourceExhausted);
  spec.out_features = 60;
  EXPECT_THAT(device.backend->PackLinear(spec, zeros, {}).status().message(),
              HasSubstr("out_features 60 of a linear layer is not a multiple of 8"));
  spec.out_features = 64;
  spec.compute_dtype = DType::kF32;
  EXPECT_THAT(device.backend->PackLinear(spec, zeros, {}).status().message(),
              HasSubstr("bf16 weights cannot be multiplied as f32"));
  spec.compute_dtype = DType::kBF16;
  const RowReader broken = [](int64_t, int64_t, void*) {
    return DataLoss("short file");
  };
  EXPECT_EQ(device.backend->PackLinear(spec, broken, {}).status().ToString(),
            "DATA_LOSS: short file");
}

struct ModelCase {
  const char* name;
  TinyModelSpec spec;
  double difference_max;
};

void PrintTo(const ModelCase& c, std::ostream* out) { *out << c.name; }

class CudaModelSpec : public testing::TestWithParam<ModelCase> {};

TinyModelSpec OnDevice(TinyModelSpec spec) {
  spec.hidden = 64;
  spec.inner = 96;
  spec.head_dim = 64;
  return spec;
}

TEST_P(CudaModelSpec, EqualsAPlainTransformer) {
  EmulatedDevice device;
  const TinyModel tiny(OnDevice(GetParam().spec));
  const auto model = LoadTiny(tiny, *device.backend);
  for (int32_t count : {1, 37}) {
    SCOPED_TRACE(count);
    const auto tokens = RandomTokens(count, 5);
    KvCache cache = MakeCache(*model, count);
    const Prefilled result = Prefill(
        *model,
        {.num_tokens = count, .attention = kDenseOptions, .logit_rows = AllRows(count)},
        tokens, cache);
    ASSERT_TRUE(result.status.ok()) << result.status.ToString();
    EXPECT_LE(Difference(result.logits, ReferenceModel(tiny).Logits(tokens)),
              GetParam().difference_max);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CudaModelSpec,
    testing::Values(
        ModelCase{"llama_bf16", {.dtype = DType::kBF16}, kBf16ComputeMax},
        ModelCase{"llama_f16", {.dtype = DType::kF16}, kF16CacheMax},
        ModelCase{"llama_f32_as_bf16", {}, kBf16ComputeMax},
        ModelCase{"qwen2_biases",
                  {.model_type = "qwen2", .dtype = DType::kF16},
                  kF16CacheMax},
        ModelCase{"qwen3_tied",
                  {.model_type = "qwen3", .tied = true, .dtype = DType::kF16},
                  kF16CacheMax},
        ModelCase{"one_kv_head",
                  {.model_type = "mistral", .kv_heads = 1, .dtype = DType::kF16},
                  kF16CacheMax},
        ModelCase{"biases_everywhere",
                  {.attention_bias = true, .mlp_bias = true, .dtype = DType::kF16},
                  kF16CacheMax}),
    testing_support::CaseName());

// Two prompts of one run, neither of whole tiles.
TEST(CudaModelVariantSpec, WideTilesGiveWhatTheChosenOnesGive) {
  const TinyModel tiny(OnDevice({.layers = 1, .dtype = DType::kBF16}));
  const auto tokens = RandomTokens(270, 8);
  const auto run = [&](cuda::AttentionVariant variant) {
    EmulatedDevice device({.attention = variant});
    const auto model = LoadTiny(tiny, *device.backend);
    KvCache cache = MakeCache(*model, 270);
    Prefilled result = Prefill(*model,
                               {.num_tokens = 270,
                                .attention = kDenseOptions,
                                .logit_rows = {0, 191, 192, 199, 200, 269},
                                .prompt_tokens = {200, 70}},
                               tokens, cache);
    EXPECT_TRUE(result.status.ok()) << result.status.ToString();
    return result.logits;
  };
  EXPECT_LE(Difference(run(cuda::AttentionVariant::kWideTiles),
                       run(cuda::AttentionVariant::kChosen)),
            1e-3);
}

// Long enough for PBS-Attn: two segments of one block, and a tail.
TEST(CudaPrefillSpec, SparsePrefillEqualsTheCpus) {
  constexpr int32_t kTokens = 300;
  const PrefillProblem problem = {
      .num_tokens = kTokens,
      .attention = {.segment_size = 128, .threshold = 0.5f, .coverage_rows = 4}};
  const TinyModel tiny(OnDevice({.dtype = DType::kF16}));
  const auto tokens = RandomTokens(kTokens, 3);
  const auto run = [&](Backend& backend) {
    const auto model = LoadTiny(tiny, backend, {.kv_dtype = DType::kF16});
    KvCache cache = MakeCache(*model, kTokens);
    EventLog log;
    Prefilled result = Prefill(*model, problem, tokens, cache, &log);
    EXPECT_TRUE(result.status.ok()) << result.status.ToString();
    return std::pair(result.logits, log.reports.front().attention);
  };
  EmulatedDevice device;
  const auto [actual, stats] = run(*device.backend);
  const auto [expected, expected_stats] = run(*MakeBackend());
  EXPECT_EQ(stats.method_run, Method::kPbs);
  EXPECT_EQ(stats.executed_blocks, expected_stats.executed_blocks);
  EXPECT_EQ(stats.coverage_rows, expected_stats.coverage_rows);
  EXPECT_NEAR(stats.coverage, expected_stats.coverage, kF16CacheMax);
  EXPECT_LT(stats.coverage, 1);
  EXPECT_LE(Difference(actual, expected), kF16CacheMax);
}

TEST(CudaPrefillSpec, SeveralPromptsRunAsOneAsEachWouldAlone) {
  EmulatedDevice device;
  const TinyModel tiny(OnDevice({.dtype = DType::kBF16}));
  const auto model = LoadTiny(tiny, *device.backend);
  const std::vector<int32_t> lengths = {37, 1, 150};
  const auto tokens = RandomTokens(188, 8);
  KvCache cache = MakeCache(*model, 188);
  const Prefilled together = Prefill(*model,
                                     {.num_tokens = 188,
                                      .attention = kDenseOptions,
                                      .logit_rows = {36, 37, 187},
                                      .prompt_tokens = lengths},
                                     tokens, cache);
  ASSERT_TRUE(together.status.ok()) << together.status.ToString();
  int32_t begin = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    KvCache own = MakeCache(*model, lengths[i]);
    const Prefilled alone =
        Prefill(*model, {.num_tokens = lengths[i], .attention = kDenseOptions},
                std::span(tokens).subspan(static_cast<size_t>(begin),
                                          static_cast<size_t>(lengths[i])),
                own);
    ASSERT_TRUE(alone.status.ok()) << alone.status.ToString();
    EXPECT_LE(Difference({together.logits[i]}, alone.logits), 1e-3) << lengths[i];
    begin += lengths[i];
  }
}

// A plan whose attention pools queries by itself.
void PoolInAttention(const Model& model, PrefillPlan& plan) {
  AttentionProblem problem = plan.attention->problem;
  problem.offers_pooled_queries = false;
  plan.attention = *model.backend().Plan(problem);
  PlaceRegions(model, plan);
}

// Also when queries begin inside a block and row tiles would end inside one.
TEST(CudaPrefillSpec, QueriesPooledOnTheWayChangeNothing) {
  constexpr int32_t kTokens = 300;
  const TinyModel tiny(
      OnDevice({.model_type = "qwen3", .layers = 1, .dtype = DType::kBF16}));
  const auto tokens = RandomTokens(kTokens, 3);
  const std::span all(tokens);
  const auto run = [&](int32_t past, int32_t row_tile, bool on_the_way) {
    EmulatedDevice device;
    const auto model = LoadTiny(tiny, *device.backend);
    KvCache cache = MakeCache(*model, kTokens);
    if (past > 0) {
      const PrefillProblem first = {.num_tokens = past, .attention = kDenseOptions};
      EXPECT_TRUE(Prefill(*model, first, all.first(past), cache).status.ok());
    }
    auto plan =
        PlanPrefill(*model, {.num_tokens = kTokens - past,
                             .past_len = past,
                             .attention = {.segment_size = 128, .threshold = 0.3f},
                             .logit_rows = {100, 200, 259}});
    EXPECT_TRUE(plan.ok()) << plan.status().ToString();
    plan->row_tile = std::min(plan->row_tile, row_tile);
    EXPECT_EQ(plan->attention->pooled_queries_bytes, 4 * 3 * 4 * 64);
    EXPECT_EQ(plan->memory.pooled_queries, 4 * 3 * 4 * 64);
    if (!on_the_way) PoolInAttention(*model, *plan);
    EventLog log;
    const Prefilled result = RunPlan(*model, *plan, all.subspan(past), cache, &log);
    EXPECT_TRUE(result.status.ok()) << result.status.ToString();
    const AttentionStats& stats = log.reports.back().attention;
    EXPECT_LT(stats.Density(), 1);
    return std::pair(result.logits, stats.executed_blocks);
  };
  EXPECT_EQ(run(0, kTokens, true), run(0, kTokens, false));
  EXPECT_EQ(run(40, 150, true), run(40, 150, false));
}

// Scores overflow in layer 1; the host is one layer ahead.
TEST(CudaPrefillSpec, AnOverflowIsToldWithTheNextLayerAndTheBackendGoesOn) {
  constexpr int32_t kTokens = 140;
  const PrefillProblem problem = {
      .num_tokens = kTokens, .attention = {.segment_size = 128, .threshold = 0.5f}};
  TinyModel tiny(OnDevice({.model_type = "qwen3", .layers = 3, .dtype = DType::kBF16}));
  EmulatedDevice device;
  const auto good = LoadTiny(tiny, *device.backend);
  for (const char* norm : {"q_norm", "k_norm"}) {
    for (float& weight :
         tiny.tensors["model.layers.1.self_attn." + std::string(norm) + ".weight"]
             .values) {
      weight = 1e20f;
    }
  }
  const auto bad = LoadTiny(tiny, *device.backend);
  const auto tokens = RandomTokens(kTokens, 3);
  KvCache cache = MakeCache(*bad, kTokens);
  EventLog log;
  const Status status = Prefill(*bad, problem, tokens, cache, &log).status;
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("attention scores pass the largest f32"));
  EXPECT_THAT(log.events, testing::ElementsAre("kv 0", "kv 1", "done 0", "kv 2"));
  EventLog after;
  ASSERT_TRUE(Prefill(*good, problem, tokens, cache, &after).status.ok());
  EXPECT_THAT(after.events, testing::ElementsAre("kv 0", "kv 1", "done 0", "kv 2",
                                                 "done 1", "done 2"));
}

TEST(CudaPrefillSpec, ContinuesACache) {
  EmulatedDevice device;
  const TinyModel tiny(OnDevice({.dtype = DType::kF16}));
  const auto model = LoadTiny(tiny, *device.backend);
  const auto tokens = RandomTokens(20, 5);
  const std::span all(tokens);
  KvCache cache = MakeCache(*model, 20);
  ASSERT_TRUE(Prefill(*model, {.num_tokens = 15, .attention = kDenseOptions},
                      all.first(15), cache)
                  .status.ok());
  const Prefilled rest =
      Prefill(*model, {.num_tokens = 5, .past_len = 15, .attention = kDenseOptions},
              all.subspan(15), cache);
  const auto expected = ReferenceModel(tiny).Logits(tokens);
  EXPECT_LE(Difference(rest.logits, ReferenceModel::Rows{expected.back()}),
            kF16CacheMax);
}

Status LoadAndPrefill(const TinyModel& tiny, std::span<const int32_t> tokens,
                      Backend& backend) {
  const TempFolder folder;
  tiny.Write(folder, 1);
  PBS_ASSIGN_OR_RETURN(const auto model, Model::Load(folder.path(), {}, backend));
  const auto count = static_cast<int32_t>(tokens.size());
  PBS_ASSIGN_OR_RETURN(KvCache cache, KvCache::Create(model->kv_shape(count), backend));
  return Prefill(*model, {.num_tokens = count, .attention = kDenseOptions}, tokens,
                 cache)
      .status;
}

Status WaitForAll(Backend& backend) {
  PBS_RETURN_IF_ERROR(backend.MarkTime(0));
  return backend.SecondsBetween(0, 0).status();
}

// Wherever the device breaks: an error, soon; no hang, no result, no memory kept.
TEST(CudaFaultSpec, ABrokenDeviceEndsEveryCallWithItsReason) {
  const TinyModel tiny(OnDevice({.layers = 1, .dtype = DType::kF16}));
  const auto tokens = RandomTokens(5, 1);
  int64_t broken_runs = 0;
  for (int64_t breaks_at = 1;; breaks_at += 7) {
    SCOPED_TRACE(breaks_at);
    EmulatedDevice device({.breaks_at = breaks_at});
    const int64_t before = device.driver->bytes_held();
    const Status status = LoadAndPrefill(tiny, tokens, *device.backend);
    EXPECT_EQ(device.driver->bytes_held(), before);
    if (status.ok() && WaitForAll(*device.backend).ok()) break;
    ++broken_runs;
    EXPECT_THAT(device.backend->Health().message(), HasSubstr("the device broke"));
    EXPECT_THAT(WaitForAll(*device.backend).message(), HasSubstr("the device broke"));
    EXPECT_FALSE(device.backend->Allocate(8).ok());
  }
  EXPECT_GT(broken_runs, 5);
}

}  // namespace
}  // namespace pbs::emulator
