// Spec: docs/KERNELS.md, "CPU". Given orders and lists, determinism, reports and memory
// of every table of the CPU backend; attention_matrix_test.cc compares all methods with
// the reference. The first lines of a run say which tables executed.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pbs/block_mask.h"
#include "tests/support/case_name.h"
#include "tests/unit/kernels/cpu_attention_fixture.h"

namespace pbs::cpu {
namespace {

TEST(CpuTables, SayWhichOfThemThisMachineExecutes) {
  for (const Engine& engine : kEngines) {
    std::printf("table %-12s %s\n", KernelsFor(engine.isa).isa_name,
                IsSupported(engine.isa) ? "EXECUTED" : "NOT RUN (this CPU lacks it)");
    EXPECT_STREQ(KernelsFor(engine.isa).isa_name, IsaName(engine.isa));
  }
  EXPECT_TRUE(IsSupported(Isa::kScalar));
}

// Of a case that is the same for every table, kept by its name.
const reference::Result& ExpectedResult(std::string_view name,
                                        const AttentionProblem& problem,
                                        const AttentionTensors& tensors) {
  static auto& kept = *new std::map<std::string, reference::Result, std::less<>>;
  const auto found = kept.find(name);
  if (found != kept.end()) return found->second;
  return kept[std::string(name)] = reference::Run(problem, tensors);
}

TEST_P(CpuAttentionSpec, GivesEqualBitsOnEveryRunAndForEveryThreadCount) {
  AttentionProblem problem = MakeProblem(kShapes[7], DType::kBF16, {});
  AttentionCase first(problem, 3);
  ASSERT_TRUE(RunOn(attention_, problem, first.Tensors()).status.ok());
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CpuAttention attention(pool, GetParam().isa, GetParam().pairs);
    AttentionCase again(problem, 3);
    ASSERT_TRUE(RunOn(attention, problem, again.Tensors()).status.ok());
    EXPECT_EQ(first.o_bytes(), again.o_bytes()) << threads << " threads";
  }
}

TEST_P(CpuAttentionSpec, GivenListsAndOrderAreUsedExactly) {
  AttentionProblem problem = MakeProblem(kShapes[5], DType::kF32, {});
  AttentionCase inputs(problem, 9);
  const BackendRun own = RunOn(attention_, problem, inputs.Tensors());
  ASSERT_TRUE(own.status.ok());
  problem.options.use_given_order = true;
  problem.options.use_given_lists = true;
  AttentionTensors tensors = inputs.Tensors();
  // Reversed segments and diagonal-only lists: nothing the method would choose itself.
  std::vector<int32_t> order(own.report.order);
  const int32_t body = 701 / 256 * 256;
  for (int32_t head = 0; head < 2; ++head) {
    for (int32_t slot = 0; slot < body; ++slot) {
      order[head * 701 + slot] = slot / 256 * 256 + 255 - slot % 256;
    }
  }
  tensors.order = {order.data(), PackedLayout(701, 1)};
  const AttentionGeometry g = MakeGeometry(problem);
  std::vector<uint8_t> mask(static_cast<size_t>(MaskBytes(g)));
  for (int32_t row = 0; row < 4 * 6; ++row) {
    const int32_t i = row % 6;
    for (int32_t j = 0; j < 6; ++j) mask[row * 6 + j] = i / 2 == j / 2;
  }
  const auto lists = ListsFromMask(g, mask);
  ASSERT_TRUE(lists.ok());
  tensors.lists = lists->View();
  ASSERT_TRUE(ValidateOrder(g, tensors.order).ok());
  ASSERT_TRUE(ValidateLists(g, tensors.order, tensors.lists).ok());
  const BackendRun run = RunOn(attention_, problem, tensors);
  ASSERT_TRUE(run.status.ok()) << run.status.ToString();
  EXPECT_EQ(run.report.order, order);
  EXPECT_EQ(ExpandMask(g, run.report.lists.View()), mask);
  ExpectOutputsNear(inputs, ExpectedResult("given lists", problem, tensors).output,
                    OutputTolerance(DType::kF32, false, 96));
}

struct ReadableMask {
  uint32_t bits;
  BlockLists lists;
};

// The masks of 4 x 4 blocks that a run may be given.
std::vector<ReadableMask> FindReadableMasks(const AttentionGeometry& g,
                                            const ConstRows& order) {
  std::vector<ReadableMask> readable;
  for (uint32_t bits = 0; bits < (1u << 16); ++bits) {
    std::vector<uint8_t> mask(16);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = (bits >> i) & 1;
    auto lists = ListsFromMask(g, mask);
    EXPECT_TRUE(lists.ok());
    if (!ValidateLists(g, order, lists->View()).ok()) continue;
    readable.push_back({bits, *std::move(lists)});
  }
  return readable;
}

// 64 masks of single-block segments and 256 of segments of two blocks.
TEST_P(CpuAttentionSpec, AttendsUnderEveryReadableMaskOfFourBlocks) {
  for (int32_t blocks_per_segment : {1, 2}) {
    AttentionOptions options;
    options.block_size = 16;
    options.segment_size = 16 * blocks_per_segment;
    options.use_given_lists = true;
    options.use_given_order = true;
    const AttentionProblem problem =
        MakeProblem({"", 1, 1, 32, {{61, 61}}}, DType::kF32, options);
    AttentionCase inputs(problem, 13);
    std::vector<int32_t> identity(61);
    std::iota(identity.begin(), identity.end(), 0);
    const ConstRows order = {identity.data(), PackedLayout(61, 1)};
    static auto& kept = *new std::map<int32_t, std::vector<ReadableMask>>;
    std::vector<ReadableMask>& readable = kept[blocks_per_segment];
    if (readable.empty()) readable = FindReadableMasks(inputs.geometry(), order);
    EXPECT_EQ(readable.size(), blocks_per_segment == 1 ? 64u : 256u);
    for (const ReadableMask& mask : readable) {
      const std::string name = "segments of " + std::to_string(blocks_per_segment) +
                               " mask bits " + std::to_string(mask.bits);
      SCOPED_TRACE(name);
      AttentionTensors tensors = inputs.Tensors();
      tensors.lists = mask.lists.View();
      tensors.order = order;
      ASSERT_TRUE(RunOn(attention_, problem, tensors).status.ok());
      ExpectOutputsNear(inputs, ExpectedResult(name, problem, tensors).output,
                        OutputTolerance(DType::kF32, false, 32));
    }
  }
}

// Whole segments, short tails, and prompts that are nothing but a tail.
TEST_P(CpuAttentionSpec, GivenListsWithoutAnOrderMeetTheComputedOne) {
  for (int32_t length : {100, 256, 300, 700}) {
    const std::string name = "no order, length " + std::to_string(length);
    SCOPED_TRACE(name);
    AttentionProblem problem =
        MakeProblem({"", 2, 1, 64, {{length, length}}}, DType::kF32, {});
    problem.options.use_given_lists = true;
    AttentionCase inputs(problem, 19);
    const AttentionGeometry& g = inputs.geometry();
    const int32_t n = g.sequences[0].num_key_blocks;
    std::vector<uint8_t> mask(static_cast<size_t>(2 * n * n));
    for (int32_t i = 0; i < 2 * n * n; ++i) {  // own segment, and block 0
      mask[i] = i % n == 0 || i % n / 2 == i / n % n / 2;
    }
    const auto lists = ListsFromMask(g, mask);
    ASSERT_TRUE(lists.ok());
    AttentionTensors tensors = inputs.Tensors();
    tensors.lists = lists->View();
    ASSERT_TRUE(ValidateLists(g, {}, tensors.lists).ok());
    const BackendRun run = RunOn(attention_, problem, tensors);
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    const reference::Result& expected = ExpectedResult(name, problem, tensors);
    EXPECT_EQ(run.report.order, expected.decision.order);
    ExpectOutputsNear(inputs, expected.output, OutputTolerance(DType::kF32, false, 64));
  }
}

TEST_P(CpuAttentionSpec, IdentityOrderSelectsWhatTheUnpermutedRuleSelects) {
  AttentionProblem problem = MakeProblem(kShapes[5], DType::kF32, {});
  problem.options.use_given_order = true;
  AttentionCase inputs(problem, 17);
  std::vector<int32_t> identity(static_cast<size_t>(2 * 701));
  for (size_t i = 0; i < identity.size(); ++i)
    identity[i] = static_cast<int32_t>(i % 701);
  AttentionTensors tensors = inputs.Tensors();
  tensors.order = {identity.data(), PackedLayout(701, 1)};
  const BackendRun run = RunOn(attention_, problem, tensors);
  ASSERT_TRUE(run.status.ok());
  // The unpermuted rule, written out: means of plain blocks, past segments only.
  const reference::Result& expected = ExpectedResult("identity", problem, tensors);
  EXPECT_EQ(run.report.order, identity);
  EXPECT_EQ(run.report.lists.indices, expected.decision.lists.indices);
  ExpectOutputsNear(inputs, expected.output, OutputTolerance(DType::kF32, false, 96));
}

// f32 products in another order: the tables differ by rounding alone.
TEST(CpuTables, AgreeWithEachOther) {
  AttentionProblem problem = MakeProblem(kShapes[5], DType::kF32, {});
  std::vector<AttentionCase> results;
  std::vector<BackendRun> runs;
  const std::vector<Engine> engines = RunnableEngines();
  ThreadPool pool(2);
  for (const Engine& engine : engines) {
    CpuAttention attention(pool, engine.isa, engine.pairs);
    results.emplace_back(problem, 23);
    runs.push_back(RunOn(attention, problem, results.back().Tensors()));
    ASSERT_TRUE(runs.back().status.ok()) << engine.name;
  }
  for (size_t i = 1; i < engines.size(); ++i) {
    EXPECT_EQ(runs[i].report.order, runs[0].report.order) << engines[i].name;
    double worst = 0;
    for (int64_t row = 0; row < 701; ++row) {
      for (int32_t d = 0; d < 96; ++d) {
        worst = std::max<double>(
            worst, std::abs(results[i].O(3, row, d) - results[0].O(3, row, d)));
      }
    }
    EXPECT_LE(worst, 2 * OutputTolerance(DType::kF32, false, 96)) << engines[i].name;
  }
}

TEST_P(CpuAttentionSpec, ReportsUnderWayOutliveTheirWorkspaceAndFinishInOrder) {
  std::vector<AttentionReport> expected;
  std::vector<std::unique_ptr<AttentionPlan>> plans;
  std::vector<AttentionCase> inputs;
  for (const Shape& shape : {kShapes[3], kShapes[4]}) {
    const AttentionProblem problem = MakeProblem(shape, DType::kF32, {});
    inputs.emplace_back(problem, 1);
    expected.push_back(RunOn(attention_, problem, inputs.back().Tensors()).report);
    plans.push_back(*attention_.Plan(problem));
  }
  ASSERT_NE(expected[0].stats.executed_blocks, expected[1].stats.executed_blocks);
  const int64_t bytes = std::max(plans[0]->workspace_bytes, plans[1]->workspace_bytes);
  std::vector<uint64_t> memory(static_cast<size_t>(bytes / 8 + 16));
  const auto aligned = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
  const Workspace workspace = {reinterpret_cast<void*>(aligned), bytes};
  for (size_t i : {0, 1}) {
    ASSERT_TRUE(attention_.Run(*plans[i], inputs[i].Tensors(), workspace, {}).ok());
    ASSERT_TRUE(attention_.StartReport(*plans[i], workspace).ok());
    std::fill(memory.begin(), memory.end(), UINT64_MAX);
  }
  for (size_t i : {0, 1}) {
    AttentionReport report;
    ASSERT_TRUE(attention_.FinishReport(*plans[i], &report).ok());
    EXPECT_EQ(report.stats.executed_blocks, expected[i].stats.executed_blocks);
    EXPECT_EQ(report.stats.method_run, expected[i].stats.method_run);
    EXPECT_EQ(report.heads.density, expected[i].heads.density);
    EXPECT_GT(report.stats.attend_seconds, 0);
    EXPECT_TRUE(report.order.empty());
  }
}

TEST_P(CpuAttentionSpec, HeadsThatKeepTooLittleReadEveryBlockAndAreNamed) {
  AttentionOptions options = {.block_size = 16, .segment_size = 32, .threshold = 0.3f};
  options.coverage_rows = 8;
  AttentionProblem problem = {
      .shape = {8, 2, 64, {{400, 400}}}, .dtype = DType::kF32, .options = options};
  AttentionCase inputs(problem, 3);
  const AttentionReport free = RunOn(attention_, problem, inputs.Tensors()).report;
  ASSERT_EQ(free.heads.coverage.size(), 8u);
  EXPECT_TRUE(free.heads.guarded.empty());
  std::vector<double> sorted = free.heads.coverage;
  std::sort(sorted.begin(), sorted.end());
  // Between the third and the fourth head.
  problem.options.coverage_min = static_cast<float>((sorted[2] + sorted[3]) / 2);
  const AttentionReport guarded = RunOn(attention_, problem, inputs.Tensors()).report;
  std::vector<int32_t> expected;
  for (int32_t head = 0; head < 8; ++head) {
    const bool low = free.heads.coverage[head] < problem.options.coverage_min;
    if (low) expected.push_back(head);
    EXPECT_NEAR(guarded.heads.coverage[head], low ? 1 : free.heads.coverage[head],
                1e-6);
    EXPECT_NEAR(guarded.heads.density[head], low ? 1 : free.heads.density[head], 1e-12);
  }
  EXPECT_EQ(guarded.heads.guarded, expected);
  EXPECT_EQ(guarded.heads.guarded.size(), 3u);
}

TEST_P(CpuAttentionSpec, StopsWhenToldAndRefusesASmallWorkspace) {
  const AttentionProblem problem = MakeProblem(kShapes[7], DType::kF32, {});
  AttentionCase inputs(problem, 1);
  const std::atomic<bool> stop{true};
  EXPECT_EQ(RunOn(attention_, problem, inputs.Tensors(), {.stop = &stop}).status.code(),
            StatusCode::kCancelled);
  const auto plan = attention_.Plan(problem);
  ASSERT_TRUE(plan.ok());
  const Status status = attention_.Run(**plan, inputs.Tensors(), {nullptr, 100}, {});
  EXPECT_EQ(status.code(), StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("workspace of 100 bytes is smaller than the planned"),
            std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Tables, CpuAttentionSpec, testing::ValuesIn(RunnableEngines()),
                         testing_support::CaseName());

TEST(CpuPlanSpec, PackedMemoryGrowsLinearlyAndListsAreUint16) {
  ThreadPool pool(2);
  CpuAttention attention(pool, Isa::kScalar, false);
  const auto memory = [&](int32_t len) {
    const AttentionProblem problem =
        MakeProblem({"", 32, 8, 128, {{len, len}}}, DType::kBF16, {});
    return (*attention.Plan(problem))->memory;
  };
  // One KV head of 64K keys: keys and values as f32.
  EXPECT_EQ(memory(65'536).packed_bytes, 65'536LL * 128 * 4 * 2);
  EXPECT_EQ(memory(131'072).packed_bytes, 2 * memory(65'536).packed_bytes);
  // 64K tokens, 512 blocks in 256 segments of 2: rows of 2, 2, 4, 4 ... entries.
  const int64_t entries = 2 * (2LL * 256 * 257 / 2) * 32;
  EXPECT_EQ(memory(65'536).lists_bytes, 2 * entries + 2 * 512 * 32);
}

}  // namespace
}  // namespace pbs::cpu
