// Spec: docs/KERNELS.md. Every method with its options, on every kind of shape, dtype
// and table of the CPU backend, against the f64 reference.
//
//   order, lists  the reference's own; blocks next to a threshold may differ
//   statistics    the reference's
//   o, lse        the reference's for the backend's own order and lists
//
// tests/support/attention_matrix.h has the table, tolerances.h the tolerances.
#include "tests/support/attention_matrix.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/cpu_attention.h"
#include "tests/support/case_name.h"

namespace pbs::cpu {
namespace {

// Sanitized builds try every ninth length: every one takes minutes there.
#ifdef PBS_FEW_LENGTHS
constexpr int32_t kLengthStep = 9;
#else
constexpr int32_t kLengthStep = 1;
#endif

using testing_support::AttentionCase;
using testing_support::BackendRun;
using testing_support::LineDifference;
using testing_support::ListDifference;
using testing_support::MatrixMethod;
using testing_support::MatrixMethods;
using testing_support::MatrixProblem;
using testing_support::MatrixShape;
using testing_support::MatrixShapes;
using testing_support::SelectingMethods;

struct Engine {
  const char* name;
  Isa isa;
  DType dtype;
  bool pairs;
};

std::vector<Engine> Engines() {
  std::vector<Engine> engines;
  for (const Engine& engine :
       {Engine{"scalar_f32", Isa::kScalar, DType::kF32, false},
        Engine{"scalar_bf16", Isa::kScalar, DType::kBF16, false},
        Engine{"avx2_f32", Isa::kAvx2, DType::kF32, false},
        Engine{"avx2_f16", Isa::kAvx2, DType::kF16, false},
        Engine{"avx2_bf16", Isa::kAvx2, DType::kBF16, false},
        Engine{"avx512_f32", Isa::kAvx512, DType::kF32, false},
        Engine{"avx512_f16", Isa::kAvx512, DType::kF16, false},
        Engine{"avx512_bf16", Isa::kAvx512, DType::kBF16, false},
        Engine{"avx512_bf16_pairs", Isa::kAvx512Bf16, DType::kBF16, true}}) {
    if (IsSupported(engine.isa)) engines.push_back(engine);
  }
  return engines;
}

void Scale(std::vector<uint8_t>& bytes, float factor) {
  auto* values = reinterpret_cast<float*>(bytes.data());
  for (size_t i = 0; i < bytes.size() / sizeof(float); ++i) values[i] *= factor;
}

// Of one sequence. Keys behind the last whole segment stay in place.
std::vector<int32_t> ReversedSegments(const AttentionGeometry& g) {
  std::vector<int32_t> order;
  for (int32_t head = 0; head < g.num_order_heads; ++head) {
    const auto keys = static_cast<int32_t>(g.total_k);
    for (int32_t slot = 0; slot < keys; ++slot) {
      const int32_t begin = slot / g.segment_size * g.segment_size;
      const bool whole = begin + g.segment_size <= keys;
      order.push_back(whole ? 2 * begin + g.segment_size - 1 - slot : slot);
    }
  }
  return order;
}

std::vector<Engine> F32Engines() {
  std::vector<Engine> engines = Engines();
  std::erase_if(engines, [](const Engine& e) { return e.dtype != DType::kF32; });
  return engines;
}

class AttentionMatrixSpec : public testing::TestWithParam<Engine> {
 protected:
  // Runs one case and compares; sums up how lists differ.
  void Check(const std::string& name, AttentionProblem problem, uint32_t seed) {
    const std::string key = name + " " + DTypeName(problem.dtype);
    SCOPED_TRACE(key + " seed " + std::to_string(seed));
    problem.options.coverage_rows = 2;
    AttentionCase inputs(problem, seed,
                         problem.dtype == DType::kF32
                             ? AttentionCase::Layout::kPacked
                             : AttentionCase::Layout::kTokenMajor);
    const BackendRun run =
        testing_support::RunOn(attention_, problem, inputs.Tensors());
    ASSERT_TRUE(run.status.ok()) << run.status.ToString();
    comparison_.Compare(key, inputs, run.report, GetParam().pairs);
  }

  void TearDown() override { comparison_.ExpectFewDiffer(GetParam().name); }

  ThreadPool pool_{2};
  CpuAttention attention_{pool_, GetParam().isa, GetParam().pairs};
  testing_support::MatrixComparison comparison_;
};

TEST_P(AttentionMatrixSpec, EveryMethodOnEveryShapeIsTheReferences) {
  for (const MatrixMethod& method : MatrixMethods()) {
    for (const MatrixShape& shape : MatrixShapes()) {
      Check(method.name + " " + shape.name,
            MatrixProblem(shape, GetParam().dtype, method.options), 7);
    }
  }
}

TEST_P(AttentionMatrixSpec, EveryMethodOnEveryBlockSizeIsTheReferences) {
  for (const MatrixMethod& method : SelectingMethods()) {
    for (const int32_t block : {32, 64, 128, 256}) {
      for (const bool permute : {false, true}) {
        AttentionOptions options = method.options;
        options.block_size = block;
        if (permute) options.permute = options.method != Method::kPbs;
        if (Permutes(options)) options.segment_size = 2 * block;
        const MatrixShape shape = {"", 2, 1, 32, {{150, 700}}};
        Check(method.name + (permute ? " permuted" : "") + " block " +
                  std::to_string(block),
              MatrixProblem(shape, GetParam().dtype, options), 11);
      }
    }
  }
}

// Spans that leave most of a long sequence out: queries read the distances next to
// them, a few others, and columns that lie in no listed block.
TEST_P(AttentionMatrixSpec, LinesOfALongSequenceAreTheReferences) {
  struct Lines {
    const char* name;
    int32_t columns, distances, block_size;
    bool permute, correct;
  };
  for (const Lines& c : {Lines{"near", 60, 100, 16, false, false},
                         Lines{"near_block_128", 200, 80, 128, false, false},
                         Lines{"near_block_256", 64, 100, 256, false, true},
                         Lines{"far", 40, 108, 32, false, true},
                         Lines{"far_block_64", 100, 106, 64, false, false},
                         Lines{"permuted", 60, 100, 64, true, true}}) {
    AttentionOptions options;
    options.method = Method::kMInference;
    options.block_size = c.block_size;
    options.vertical_tokens = c.columns;
    options.slash_tokens = c.distances;
    options.permute = c.permute;
    options.mean_correction = c.correct;
    if (c.permute) options.segment_size = 2 * c.block_size;
    const MatrixShape shape = {"", 2, 1, 32, {{301, 1999}, {700, 900}}};
    Check(std::string("long ") + c.name,
          MatrixProblem(shape, GetParam().dtype, options), 37);
  }
}

// Blocks of 16, segments of 32: up to four blocks and two whole segments.
// Heads, tiles and segments of the default sizes.
TEST_P(AttentionMatrixSpec, EveryMethodOnBlocksOf128IsTheReferences) {
  for (const MatrixMethod& method : SelectingMethods()) {
    const AttentionOptions options = testing_support::WithBlocksOf128(method.options);
    for (const MatrixShape& shape : testing_support::ShapesOfBlocksOf128()) {
      Check(method.name + " block 128 " + shape.name,
            MatrixProblem(shape, GetParam().dtype, options), 31);
    }
  }
}

// What does not depend on the dtype: lengths, and scores, which are f32 for all.
class AttentionF32Spec : public AttentionMatrixSpec {};

TEST_P(AttentionF32Spec, EveryMethodOnEverySmallLengthIsTheReferences) {
  for (const MatrixMethod& method : MatrixMethods()) {
    for (int32_t length = 1; length <= 70; length += kLengthStep) {
      const MatrixShape shape = {"", 2, 1, 32, {{length, length}}};
      Check(method.name + " length " + std::to_string(length),
            MatrixProblem(shape, GetParam().dtype, method.options), 13);
    }
  }
}

TEST_P(AttentionF32Spec, EveryMethodOnEveryNumberOfLastQueriesIsTheReferences) {
  for (const MatrixMethod& method : MatrixMethods()) {
    for (int32_t queries = 0; queries <= 69; queries += kLengthStep) {
      const MatrixShape shape = {"", 2, 1, 32, {{queries, 69}}};
      Check(method.name + " queries " + std::to_string(queries),
            MatrixProblem(shape, GetParam().dtype, method.options), 17);
    }
  }
}

// A given order has no ties, so that rounded scores are compared too.
TEST_P(AttentionMatrixSpec, ListsOfAGivenOrderAreTheReferences) {
  for (const MatrixMethod& method : MatrixMethods()) {
    if (!Permutes(method.options) || method.options.dense_fallback) continue;
    for (const MatrixShape& shape : MatrixShapes()) {
      SCOPED_TRACE(method.name + " " + shape.name);
      AttentionProblem problem = MatrixProblem(shape, GetParam().dtype, method.options);
      AttentionCase inputs(problem, 23);
      const auto order = reference::Decide(problem, inputs.Tensors()).order;
      problem.options.use_given_order = true;
      AttentionCase given(problem, 23);
      AttentionTensors tensors = given.Tensors();
      tensors.order = {order.data(), PackedLayout(given.geometry().total_k, 1)};
      const BackendRun run = testing_support::RunOn(attention_, problem, tensors);
      ASSERT_TRUE(run.status.ok()) << run.status.ToString();
      EXPECT_EQ(run.report.order, order);
      EXPECT_EQ(run.report.lists.indices,
                reference::Decide(problem, tensors).lists.indices);
    }
  }
}

struct InputCase {
  const char* name;
  float queries;  // factors of the inputs
  float keys;
};

// Scores that all tie, and scores so far apart that many probabilities are 0 in f32.
TEST_P(AttentionF32Spec, ListsOfExtremeScoresAreTheReferences) {
  for (const InputCase& c :
       {InputCase{"zero_queries", 0, 1}, InputCase{"zero_keys", 1, 0},
        InputCase{"all_zero", 0, 0}, InputCase{"far_apart", 6, 6}}) {
    for (const MatrixMethod& method : MatrixMethods()) {
      SCOPED_TRACE(std::string(c.name) + " " + method.name);
      AttentionProblem problem =
          MatrixProblem(MatrixShapes()[0], DType::kF32, method.options);
      if (method.options.dense_fallback) continue;
      // An order by importances that are 0 in f32 only is the backend's own.
      problem.options.use_given_order = Permutes(problem.options);
      AttentionCase inputs(problem, 29);
      Scale(inputs.q_bytes(), c.queries);
      Scale(inputs.k_bytes(), c.keys);
      AttentionTensors tensors = inputs.Tensors();
      const std::vector<int32_t> order = ReversedSegments(inputs.geometry());
      tensors.order = {order.data(), PackedLayout(inputs.geometry().total_k, 1)};
      const BackendRun run = testing_support::RunOn(attention_, problem, tensors);
      ASSERT_TRUE(run.status.ok()) << run.status.ToString();
      const auto expected = reference::Decide(problem, tensors);
      const LineDifference lines = testing_support::CompareLines(
          problem, tensors, run.report.lines, expected.lines);
      EXPECT_LE(lines.apart, testing_support::kThresholdSlack);
      if (lines.differ > 0) continue;
      EXPECT_EQ(testing_support::CompareLists(problem, tensors, run.report.lists,
                                              expected.lists)
                    .outside,
                0);
    }
  }
}

// With `threshold` or `gamma` 1, and with all distances, every candidate is selected.
TEST_P(AttentionMatrixSpec, ThresholdOneAndAllDistancesAreDense) {
  for (const MatrixMethod& method : MatrixMethods()) {
    AttentionOptions options = method.options;
    if (options.method == Method::kDense || options.method == Method::kFlashPrefill) {
      continue;
    }
    if (options.method == Method::kMInference) {
      options.slash_tokens = 300;  // of every shape
    } else {
      (options.method == Method::kFlexPrefill ? options.gamma : options.threshold) = 1;
    }
    for (const MatrixShape& shape : MatrixShapes()) {
      SCOPED_TRACE(method.name + " " + shape.name);
      AttentionCase sparse(MatrixProblem(shape, GetParam().dtype, options), 19);
      const BackendRun run =
          testing_support::RunOn(attention_, sparse.problem(), sparse.Tensors());
      ASSERT_TRUE(run.status.ok()) << run.status.ToString();
      EXPECT_DOUBLE_EQ(run.report.stats.Density(), 1);
      AttentionOptions all;
      all.method = Method::kDense;
      all.block_size = 16;
      AttentionCase dense(MatrixProblem(shape, GetParam().dtype, all), 19);
      const std::string key = std::string("dense seed 19 ") + shape.name + " " +
                              DTypeName(GetParam().dtype);
      const auto errors = testing_support::LargestErrors(
          sparse, testing_support::MatrixComparison::Answers().Run(key, dense).output);
      EXPECT_LE(errors.o, testing_support::OutputTolerance(
                              GetParam().dtype, GetParam().pairs, shape.head_dim));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Engines, AttentionMatrixSpec, testing::ValuesIn(Engines()),
                         testing_support::CaseName());
INSTANTIATE_TEST_SUITE_P(Engines, AttentionF32Spec, testing::ValuesIn(F32Engines()),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::cpu
