// Spec: cuda/plan and cuda/selection, whole runs on the emulator against
// kernels/reference.
#include "cuda/plan/pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "tests/emulator/pipeline_case.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

class PipelineSpec : public testing::TestWithParam<PipelineCase> {};

TEST_P(PipelineSpec, EqualsTheReference) { CheckCase(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    Cases, PipelineSpec,
    testing::Values(
        PipelineCase{
            "dense", Shape(2, 1, 64, {{300, 300}}), {.method = Method::kDense}},
        PipelineCase{"pbs", Shape(2, 1, 64, {{1000, 1000}}), {.threshold = 0.7f}},
        PipelineCase{"query_head_scope",
                     Shape(2, 1, 64, {{800, 800}}),
                     {.threshold = 0.6f, .scope = Scope::kQueryHead}},
        PipelineCase{"query_head_scope_of_a_short_prompt",
                     Shape(4, 2, 64, {{200, 200}}),
                     {.scope = Scope::kQueryHead}},
        PipelineCase{
            "everything_kept", Shape(1, 1, 64, {{700, 700}}), {.threshold = 1}},
        PipelineCase{"no_first_block",
                     Shape(1, 1, 64, {{900, 900}}),
                     {.threshold = 0.3f, .force_first_block = false}},
        PipelineCase{"longer_segments",
                     Shape(2, 2, 96, {{1000, 1000}}),
                     {.segment_size = 384, .threshold = 0.5f}},
        PipelineCase{"wide_heads", Shape(2, 1, 256, {{40, 600}}), {.threshold = 0.6f}},
        PipelineCase{"segments_of_many_threads",
                     Shape(1, 1, 64, {{64, 2400}}),
                     {.segment_size = 2176, .threshold = 0.7f}},
        PipelineCase{"batch_with_offsets_and_short_prompts",
                     Shape(2, 1, 64, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}),
                     {.threshold = 0.5f}},
        PipelineCase{"mean_pooling",
                     Shape(2, 1, 64, {{900, 900}}),
                     {.method = Method::kMeanPooling, .threshold = 0.6f}},
        PipelineCase{"first_and_last_blocks_forced",
                     Shape(2, 1, 64, {{1100, 1100}, {300, 900}}),
                     {.threshold = 0.05f,
                      .force_first_block = false,
                      .sink_blocks = 1,
                      .window_blocks = 5}},
        PipelineCase{"last_queries_dense",
                     Shape(2, 1, 64, {{1100, 1100}, {130, 900}}),
                     {.threshold = 0.05f, .dense_tail_blocks = 3}},
        PipelineCase{"blocks_forced_without_an_order",
                     Shape(2, 1, 64, {{1000, 1000}, {1, 700}}),
                     {.method = Method::kMeanPooling,
                      .threshold = 0.05f,
                      .force_first_block = false,
                      .dense_tail_blocks = 1,
                      .sink_blocks = 2,
                      .window_blocks = 3}},
        PipelineCase{"more_blocks_forced_than_there_are",
                     Shape(1, 1, 64, {{700, 700}}),
                     {.method = Method::kMeanPooling,
                      .threshold = 0.05f,
                      .dense_tail_blocks = 9999,
                      .sink_blocks = 9999,
                      .window_blocks = 9999}},
        PipelineCase{
            "mean_pooling_of_sorted_keys",
            Shape(4, 2, 64, {{900, 900}, {130, 700}, {200, 200}}),
            {.method = Method::kMeanPooling, .threshold = 0.5f, .permute = true}},
        PipelineCase{"mean_pooling_of_sorted_keys_of_every_head",
                     Shape(2, 1, 64, {{800, 800}}),
                     {.method = Method::kMeanPooling,
                      .segment_size = 384,
                      .threshold = 0.5f,
                      .scope = Scope::kQueryHead,
                      .permute = true}},
        PipelineCase{"prism",
                     Shape(2, 1, 64, {{1000, 1000}}),
                     {.method = Method::kPrism, .threshold = 0.5f}},
        PipelineCase{"prism_of_a_batch_with_narrow_bands",
                     Shape(2, 1, 96, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}),
                     {.method = Method::kPrism,
                      .threshold = 0.6f,
                      .fast_threshold = 0.2f,
                      .slow_dims = 32,
                      .fast_dims = 20}},
        PipelineCase{"prism_of_wide_heads_and_one_pair",
                     Shape(1, 1, 256, {{260, 600}}),
                     {.method = Method::kPrism,
                      .threshold = 0.3f,
                      .force_first_block = false,
                      .slow_dims = 256,
                      .fast_dims = 2}},
        PipelineCase{"prism_of_sorted_keys_with_a_tail",
                     Shape(2, 1, 64, {{1100, 1100}}),
                     {.method = Method::kPrism,
                      .threshold = 0.4f,
                      .permute = true,
                      .dense_tail_blocks = 1}},
        PipelineCase{"prism_of_sorted_keys_of_every_head",
                     Shape(2, 1, 64, {{900, 900}}),
                     {.method = Method::kPrism,
                      .threshold = 0.4f,
                      .scope = Scope::kQueryHead,
                      .permute = true}},
        PipelineCase{"prism_keeps_everything",
                     Shape(1, 1, 64, {{700, 700}}),
                     {.method = Method::kPrism, .threshold = 1}},
        PipelineCase{"flashprefill",
                     Shape(2, 1, 64, {{1000, 1000}}),
                     {.method = Method::kFlashPrefill, .alpha = 0.3f}},
        PipelineCase{
            "flashprefill_as_published",
            Shape(2, 1, 64, {{1400, 1400}, {1, 700}}),
            {.method = Method::kFlashPrefill, .as_published = true, .alpha = 0.5f}},
        PipelineCase{"flashprefill_of_a_batch",
                     Shape(4, 2, 96, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}),
                     {.method = Method::kFlashPrefill, .alpha = 0.5f}},
        PipelineCase{"flashprefill_of_wide_heads",
                     Shape(1, 1, 256, {{200, 640}}),
                     {.method = Method::kFlashPrefill, .alpha = 0.5f}},
        PipelineCase{"flashprefill_of_sorted_keys",
                     Shape(4, 2, 64, {{900, 900}, {100, 1000}}),
                     {.method = Method::kFlashPrefill,
                      .permute = true,
                      .as_published = true,
                      .alpha = 0.7f}},
        PipelineCase{"flashprefill_of_sorted_keys_of_every_head",
                     Shape(2, 1, 64, {{600, 900}}),
                     {.method = Method::kFlashPrefill,
                      .scope = Scope::kQueryHead,
                      .permute = true,
                      .alpha = 0.99f}},
        // More key blocks than are scored together.
        PipelineCase{
            "flashprefill_of_many_blocks",
            Shape(1, 1, 64, {{200, 16700}}),
            {.method = Method::kFlashPrefill, .dense_tail_blocks = 1, .alpha = 0.3f}},
        PipelineCase{"flashprefill_of_f16",
                     Shape(1, 1, 64, {{700, 700}}),
                     {.method = Method::kFlashPrefill, .alpha = 0.5f},
                     DType::kF16},
        PipelineCase{"xattention",
                     Shape(2, 1, 64, {{1000, 1000}}),
                     {.method = Method::kXAttention, .threshold = 0.5f}},
        PipelineCase{"xattention_of_the_fewest_rows_per_block",
                     Shape(2, 1, 64, {{1300, 1300}, {70, 700}}),
                     {.method = Method::kXAttention, .threshold = 0.4f, .stride = 64}},
        PipelineCase{"xattention_of_wide_heads_and_the_most_rows_per_block",
                     Shape(1, 1, 256, {{200, 640}}),
                     {.method = Method::kXAttention, .threshold = 0.5f, .stride = 2}},
        // More key blocks than are scored together, and a last row of one token.
        PipelineCase{"xattention_of_many_blocks",
                     Shape(1, 1, 64, {{130, 8193}}),
                     {.method = Method::kXAttention,
                      .threshold = 0.3f,
                      .dense_tail_blocks = 1,
                      .stride = 32}},
        PipelineCase{"fallback_where_lists_do_not_pay",
                     Shape(1, 1, 64, {{700, 700}}),
                     {.threshold = 1, .dense_fallback = true}},
        PipelineCase{"fallback_where_parts_of_blocks_do_not_pay",
                     Shape(2, 1, 64, {{600, 600}}),
                     {.method = Method::kMInference,
                      .dense_fallback = true,
                      .vertical_tokens = 140,
                      .slash_tokens = 590}},
        PipelineCase{
            "f16", Shape(2, 1, 64, {{600, 600}}), {.threshold = 0.7f}, DType::kF16}),
    testing_support::CaseName());

// A run, its order and its lists; then the same with both given.
TEST(GivenSpec, AnOrderAndListsOfTheCallerGiveTheSameBits) {
  AttentionProblem problem{Shape(2, 1, 64, {{700, 700}, {90, 600}}),
                           DType::kBF16,
                           {.threshold = 0.6f, .coverage_rows = 3}};
  const auto plan = cuda::MakeCudaPlan(problem, {});
  ASSERT_TRUE(plan.ok());
  PipelineInputs inputs(problem, 7);
  GlobalMemory::Clear();
  inputs.Allow();
  AttentionTensors tensors = inputs.Tensors();
  const PipelineRun<cuda::Bf16Element, 64> chosen(**plan, tensors, 1);
  ASSERT_TRUE(chosen.fault().ok()) << chosen.fault().ToString();
  AttentionReport report;
  ASSERT_TRUE(chosen.Report({.order = true, .lists = true}, &report).ok());
  const std::vector<uint16_t> expected(inputs.o.data(),
                                       inputs.o.data() + inputs.o.bytes() / 2);

  problem.options.use_given_order = problem.options.use_given_lists = true;
  const auto given_plan = cuda::MakeCudaPlan(problem, {});
  ASSERT_TRUE(given_plan.ok());
  tensors.order = {report.order.data(), PackedLayout((*plan)->geometry.total_k, 1)};
  tensors.lists = report.lists.View();
  const auto allow = [](const auto& values) {
    GlobalMemory::Allow(values.data(),
                        static_cast<int64_t>(values.size() * sizeof(values[0])), true);
  };
  allow(report.order);
  allow(report.lists.begin);
  allow(report.lists.count);
  allow(report.lists.indices);
  const PipelineRun<cuda::Bf16Element, 64> given(**given_plan, tensors, 2);
  ASSERT_TRUE(given.fault().ok()) << given.fault().ToString();
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), inputs.o.data()));
  AttentionReport again;
  ASSERT_TRUE(given.Report({.order = true, .lists = true}, &again).ok());
  EXPECT_EQ(again.stats.executed_blocks, report.stats.executed_blocks);
  EXPECT_EQ(again.stats.lower_blocks, report.stats.lower_blocks);
  EXPECT_EQ(again.stats.coverage, report.stats.coverage);
  EXPECT_LT(again.stats.coverage, 1);
  EXPECT_EQ(again.order, report.order);
  EXPECT_EQ(again.lists.indices, report.lists.indices);
  EXPECT_EQ(again.lists.num_masked, report.lists.num_masked);
}

// Notes what kernels ask for instead of running them.
struct LargestLaunch {
  int64_t shared_bytes = 0;

  template <class Kernel, class Params>
  void Run(int64_t blocks, int64_t bytes, const Params&) {
    if (blocks > 0) shared_bytes = std::max(shared_bytes, bytes);
  }
};

template <int kHeadDim>
int64_t LargestSharedBytes(const AttentionOptions& options,
                           const cuda::DeviceTraits& device) {
  const auto plan = cuda::MakeCudaPlan(
      {Shape(32, 8, kHeadDim, {{512 << 10, 512 << 10}}), DType::kBF16, options},
      device);
  EXPECT_TRUE(plan.ok()) << plan.status().ToString();
  alignas(256) static std::byte memory[256];  // not touched
  AttentionTensors tensors;
  tensors.q = tensors.k = tensors.v = {memory, PackedLayout(512 << 10, kHeadDim)};
  tensors.o = {memory, tensors.q.layout};
  const auto params =
      cuda::MakeRunParams(**plan, tensors, {memory, (*plan)->workspace_bytes});
  EXPECT_TRUE(params.ok()) << params.status().ToString();
  LargestLaunch launch;
  cuda::EnqueueOrder<cuda::Bf16Element, kHeadDim>(**plan, *params, launch);
  cuda::EnqueueLists<cuda::Bf16Element, kHeadDim>(**plan, *params, launch);
  using Config = cuda::Sm80Config<cuda::Bf16Element, kHeadDim>;
  return std::max<int64_t>(launch.shared_bytes, sizeof(cuda::Sm80Shared<Config>));
}

// The 99 KiB of compute capability 8.6 and 8.9, half a million tokens.
TEST(SharedMemorySpec, NoKernelTakesMoreThanASmallDeviceHas) {
  const cuda::DeviceTraits device{.shared_bytes_max = 99 << 10};
  AttentionOptions sorted = DefaultOptions(Method::kPrism);
  sorted.permute = true;
  for (const AttentionOptions& options :
       {AttentionOptions{}, AttentionOptions{.segment_size = 16384}, sorted}) {
    SCOPED_TRACE(CanonicalText(options));
    EXPECT_LE(LargestSharedBytes<64>(options, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<96>(options, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<128>(options, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<256>(options, device), device.shared_bytes_max);
  }
}

TEST(SharedMemorySpec, AntidiagonalsOfASmallDeviceGroupFewerBlocks) {
  const cuda::DeviceTraits device{.shared_bytes_max = 99 << 10};
  AttentionOptions options = DefaultOptions(Method::kXAttention);
  for (const int32_t stride : {2, 8, 64}) {
    options.stride = stride;
    EXPECT_LE(LargestSharedBytes<64>(options, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<128>(options, device), device.shared_bytes_max);
  }
  const auto plan_of = [&](int32_t tokens) {
    return cuda::MakeCudaPlan(
        {Shape(2, 1, 256, {{tokens, tokens}}), DType::kBF16, options}, device);
  };
  EXPECT_TRUE(plan_of(96 << 10).ok());
  EXPECT_EQ(plan_of((96 << 10) + 1).status().message(),
            "block scores of the longest sequence take 101504 bytes of shared memory; "
            "this device has 101376");
}

TEST(SharedMemorySpec, RowsOfWideHeadsTakeTheMostOfASmallDevice) {
  const AttentionOptions rows = DefaultOptions(Method::kFlashPrefill);
  const cuda::DeviceTraits device{.shared_bytes_max = 99 << 10};
  EXPECT_LE(LargestSharedBytes<64>(rows, device), device.shared_bytes_max);
  EXPECT_LE(LargestSharedBytes<128>(rows, device), device.shared_bytes_max);
  const auto plan_of = [&](int32_t tokens) {
    return cuda::MakeCudaPlan(
        {Shape(2, 1, 256, {{tokens, tokens}}), DType::kBF16, rows}, device);
  };
  EXPECT_TRUE(plan_of(32 << 10).ok());
  EXPECT_EQ(plan_of((32 << 10) + 1).status().message(),
            "block scores of the longest sequence take 101504 bytes of shared memory; "
            "this device has 101376");
}

TEST(SharedMemorySpec, LinesOfASmallDeviceFit) {
  const cuda::DeviceTraits device{.shared_bytes_max = 99 << 10};
  AttentionOptions lines = DefaultOptions(Method::kFlexPrefill);
  for (const bool permute : {false, true}) {
    lines.permute = permute;
    EXPECT_LE(LargestSharedBytes<64>(lines, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<96>(lines, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<128>(lines, device), device.shared_bytes_max);
    EXPECT_LE(LargestSharedBytes<256>(lines, device), device.shared_bytes_max);
  }
}

TEST(SharedMemorySpec, ColumnsAndDiagonalsFitASmallDevice) {
  const cuda::DeviceTraits device{.shared_bytes_max = 99 << 10};
  const AttentionOptions lines = DefaultOptions(Method::kMInference);
  EXPECT_LE(LargestSharedBytes<64>(lines, device), device.shared_bytes_max);
  EXPECT_LE(LargestSharedBytes<256>(lines, device), device.shared_bytes_max);
}

AttentionProblem SparseProblem(Method method) {
  AttentionProblem problem{Shape(1, 1, 64, {{600, 600}}), DType::kBF16,
                           DefaultOptions(method)};
  if (method == Method::kMInference) problem.options.slash_tokens = 200;
  return problem;
}

StatusCode CodeOfReport(const AttentionProblem& problem, PipelineInputs& inputs) {
  const auto plan = cuda::MakeCudaPlan(problem, {});
  EXPECT_TRUE(plan.ok());
  GlobalMemory::Clear();
  inputs.Allow();
  const PipelineRun<cuda::Bf16Element, 64> run(**plan, inputs.Tensors(), 1);
  EXPECT_TRUE(run.fault().ok()) << run.fault().ToString();
  AttentionReport report;
  return run.Report({}, &report).code();
}

TEST(OverflowSpec, ScoresThatAreNotFiniteAreRefusedInTheReport) {
  for (const Method method : kMethods) {
    if (!TraitsOf(method).Selects()) continue;
    SCOPED_TRACE(MethodName(method));
    const AttentionProblem problem = SparseProblem(method);
    PipelineInputs inputs(problem, 3);
    for (DeviceArray<uint16_t>* array : {&inputs.q, &inputs.k}) {
      std::fill_n(array->data(), array->bytes() / 2, ToBf16(3e19f).bits);
    }
    EXPECT_EQ(CodeOfReport(problem, inputs), StatusCode::kInvalidArgument);
  }
}

// It would change no sum: its weight is 0.
TEST(OverflowSpec, AScoreOfMinusInfinityIsRefusedWhereLinesAreMeasured) {
  for (const Method method : {Method::kFlexPrefill, Method::kMInference}) {
    for (const int32_t key : {5, 590}) {  // before the last queries, and among them
      SCOPED_TRACE(testing::Message() << MethodName(method) << ", key " << key);
      const AttentionProblem problem = SparseProblem(method);
      PipelineInputs inputs(problem, 3);
      std::fill_n(inputs.q.data(), inputs.q.bytes() / 2, ToBf16(3e19f).bits);
      std::fill_n(inputs.k.data(), inputs.k.bytes() / 2, ToBf16(0).bits);
      std::fill_n(inputs.k.data() + key * 64, 64, ToBf16(-3e19f).bits);
      EXPECT_EQ(CodeOfReport(problem, inputs), StatusCode::kInvalidArgument);
    }
  }
}

}  // namespace
}  // namespace pbs::emulator
