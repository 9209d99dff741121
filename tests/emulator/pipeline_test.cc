// Spec: cuda/plan and cuda/selection, whole runs on the emulator against
// kernels/reference.
#include "cuda/plan/pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/emulator/selection_case.h"
#include "tests/support/case_name.h"

namespace pbs::emulator {
namespace {

struct PipelineCase {
  const char* name;
  AttentionShape shape;
  AttentionOptions options;
  DType dtype = DType::kBF16;
};

void PrintTo(const PipelineCase& c, std::ostream* out) { *out << c.name; }

class PipelineSpec : public testing::TestWithParam<PipelineCase> {
 protected:
  AttentionProblem Problem() const {
    return {GetParam().shape, GetParam().dtype, GetParam().options};
  }
};

// What a run decided, as the reference says it.
template <class Run>
reference::Decision DecisionOf(const cuda::CudaAttentionPlan& plan, const Run& run) {
  const AttentionGeometry& g = plan.geometry;
  reference::Decision decision;
  decision.order.resize(static_cast<size_t>(g.num_order_heads * g.total_k));
  for (int32_t head = 0; head < g.num_order_heads; ++head) {
    for (const SequenceGeometry& s : g.sequences) {
      for (int32_t slot = 0; slot < s.k_len; ++slot) {
        decision.order[head * g.total_k + s.k_begin + slot] =
            plan.permutes
                ? run.template At<int32_t>(
                      plan.positions_at)[head * g.total_slots + s.slot_begin + slot]
                : slot;
      }
    }
  }
  // Tiles know their row; lists that are not stored are arithmetic.
  const int64_t rows = plan.num_tiles();
  std::vector<std::vector<uint16_t>> lists(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    const cuda::AttentionTile& tile = run.tiles()[i];
    const SequenceGeometry& s = g.sequences[tile.sequence];
    auto& list = lists[g.ListRow(tile.sequence, tile.head,
                                 tile.first_position / 128 - s.first_query_block)];
    for (int32_t entry = 0; entry < tile.list_count; ++entry) {
      list.push_back(
          tile.list_begin < 0
              ? static_cast<uint16_t>(entry)
              : run.template At<uint16_t>(plan.entries_at)[tile.list_begin + entry]);
    }
  }
  for (const auto& list : lists) {
    decision.lists.begin.push_back(static_cast<int64_t>(decision.lists.indices.size()));
    decision.lists.count.push_back(static_cast<uint16_t>(list.size()));
    decision.lists.num_masked.push_back(0);
    decision.lists.indices.insert(decision.lists.indices.end(), list.begin(),
                                  list.end());
  }
  return decision;
}

// Inside whole segments keys fall in importance, up to f32's rounding of it.
void ExpectSorted(const AttentionProblem& problem, const AttentionTensors& tensors,
                  const std::vector<int32_t>& order) {
  const AttentionGeometry g = MakeGeometry(problem);
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      const int32_t* slots = order.data() + head * g.total_k + s.k_begin;
      const auto importance = s.dense || s.q_len == 0
                                  ? std::vector<double>()
                                  : reference::KeyImportance(problem, tensors, n, head);
      const auto body = static_cast<int32_t>(importance.size());
      for (int32_t begin = 0; begin < body; begin += g.segment_size) {
        std::vector<int32_t> segment(slots + begin, slots + begin + g.segment_size);
        for (size_t i = 1; i < segment.size(); ++i) {
          ASSERT_LE(importance[segment[i]], importance[segment[i - 1]] * (1 + 2e-5))
              << "sequence " << n << ", head " << head << ", slot " << begin + i;
        }
        std::sort(segment.begin(), segment.end());
        for (int32_t i = 0; i < g.segment_size; ++i) {
          ASSERT_EQ(segment[i], begin + i) << "sequence " << n << ", head " << head;
        }
      }
      for (int32_t slot = body; slot < s.k_len; ++slot) ASSERT_EQ(slots[slot], slot);
    }
  }
}

template <class Element, int kHeadDim>
void CheckRun(const AttentionProblem& problem, uint32_t seed) {
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  const AttentionGeometry& g = (*plan)->geometry;
  PackedInputs inputs(problem, seed);
  GlobalMemory::Clear();
  inputs.Allow();
  const AttentionTensors tensors = inputs.Tensors();
  const PipelineRun<Element, kHeadDim> run(**plan, tensors, seed);
  ASSERT_TRUE(run.fault().ok()) << run.fault().ToString();
  const reference::Decision decision = DecisionOf(**plan, run);

  if ((*plan)->orders) ExpectSorted(problem, tensors, decision.order);
  if (!problem.options.dense_fallback) {
    const reference::Decision expected = reference::Decide(problem, tensors);
    EXPECT_EQ(ExpandMask(g, decision.lists.View()),
              ExpandMask(g, expected.lists.View()));
  }
  const reference::Output output = reference::Attend(problem, tensors, decision);
  double o_error = 0;
  double lse_error = 0;
  for (size_t i = 0; i < output.o.size(); ++i) {
    const uint16_t bits = inputs.o.data()[i];
    const float o =
        problem.dtype == DType::kBF16 ? ToFloat(bf16{bits}) : ToFloat(f16{bits});
    o_error = std::max(o_error, std::abs(o - output.o[i]));
  }
  for (size_t i = 0; i < output.lse.size(); ++i) {
    lse_error = std::max(lse_error, std::abs(inputs.lse.data()[i] - output.lse[i]));
  }
  EXPECT_LE(o_error, problem.dtype == DType::kBF16 ? 3e-2 : 4e-3);
  EXPECT_LE(lse_error, 2e-5);
}

TEST_P(PipelineSpec, EqualsTheReference) {
  const AttentionProblem problem = Problem();
  for (uint32_t seed : {1u, 2u}) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    if (problem.dtype == DType::kF16) {
      CheckRun<cuda::F16Element, 64>(problem, seed);
    } else if (problem.shape.head_dim == 96) {
      CheckRun<cuda::Bf16Element, 96>(problem, seed);
    } else {
      CheckRun<cuda::Bf16Element, 64>(problem, seed);
    }
  }
}

AttentionShape Shape(int32_t heads, int32_t kv_heads, int32_t head_dim,
                     std::vector<SequenceShape> sequences) {
  return {heads, kv_heads, head_dim, std::move(sequences)};
}

INSTANTIATE_TEST_SUITE_P(
    Cases, PipelineSpec,
    testing::Values(
        PipelineCase{
            "dense", Shape(2, 1, 64, {{300, 300}}), {.method = Method::kDense}},
        PipelineCase{"pbs", Shape(2, 1, 64, {{1000, 1000}}), {.threshold = 0.7f}},
        PipelineCase{"query_head_scope",
                     Shape(2, 1, 64, {{800, 800}}),
                     {.threshold = 0.6f, .scope = Scope::kQueryHead}},
        PipelineCase{
            "everything_kept", Shape(1, 1, 64, {{700, 700}}), {.threshold = 1}},
        PipelineCase{"no_first_block",
                     Shape(1, 1, 64, {{900, 900}}),
                     {.threshold = 0.3f, .force_first_block = false}},
        PipelineCase{"longer_segments",
                     Shape(2, 2, 96, {{1000, 1000}}),
                     {.segment_size = 384, .threshold = 0.5f}},
        PipelineCase{"batch_with_offsets_and_short_prompts",
                     Shape(2, 1, 64, {{130, 700}, {200, 200}, {1, 600}, {0, 300}}),
                     {.threshold = 0.5f}},
        PipelineCase{"mean_pooling",
                     Shape(2, 1, 64, {{900, 900}}),
                     {.method = Method::kMeanPooling, .threshold = 0.6f}},
        PipelineCase{"fallback_where_lists_do_not_pay",
                     Shape(1, 1, 64, {{700, 700}}),
                     {.threshold = 1, .dense_fallback = true}},
        PipelineCase{
            "f16", Shape(2, 1, 64, {{600, 600}}), {.threshold = 0.7f}, DType::kF16}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::emulator
