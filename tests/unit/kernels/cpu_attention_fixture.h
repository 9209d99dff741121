// Shapes, tolerances and the tables under test of the CPU attention specs.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <vector>

#include "cpu/cpu_attention.h"
#include "reference/reference_attention.h"
#include "tests/support/attention_case.h"
#include "tests/support/tolerances.h"

namespace pbs::cpu {

using testing_support::AttentionCase;
using testing_support::BackendRun;
using testing_support::OutputTolerance;
using testing_support::RunOn;

// One way to compute: a table, and whether bf16 operands are multiplied as pairs.
struct Engine {
  const char* name;
  Isa isa;
  bool pairs;
};

inline void PrintTo(const Engine& engine, std::ostream* out) { *out << engine.name; }

inline constexpr Engine kEngines[] = {{"scalar", Isa::kScalar, false},
                                      {"avx2", Isa::kAvx2, false},
                                      {"avx512", Isa::kAvx512, false},
                                      {"avx512_bf16", Isa::kAvx512Bf16, true}};

inline std::vector<Engine> RunnableEngines() {
  std::vector<Engine> engines;
  for (const Engine& engine : kEngines) {
    if (IsSupported(engine.isa)) engines.push_back(engine);
  }
  return engines;
}

struct Shape {
  const char* name;
  int32_t num_heads, num_kv_heads, head_dim;
  std::vector<SequenceShape> sequences;
};

inline const Shape kShapes[] = {
    {"one_token", 2, 1, 64, {{1, 1}}},
    {"one_block", 2, 2, 32, {{128, 128}}},
    {"block_plus_one", 2, 1, 64, {{129, 129}}},
    {"one_segment", 2, 1, 64, {{256, 256}}},
    {"segment_plus_one", 4, 2, 64, {{257, 257}}},
    {"odd_length", 4, 2, 96, {{701, 701}}},
    {"wide_head", 2, 1, 256, {{600, 600}}},
    {"mid_head", 4, 1, 128, {{640, 640}}},
    {"one_query_of_many_keys", 4, 2, 64, {{1, 777}}},
    {"offset_inside_a_block", 2, 1, 64, {{300, 777}}},
    {"batch_of_lengths", 4, 2, 64, {{513, 513}, {0, 0}, {1, 1}, {0, 40}, {90, 650}}},
};

inline AttentionProblem MakeProblem(const Shape& shape, DType dtype,
                                    AttentionOptions options) {
  AttentionProblem problem;
  problem.shape = {.num_heads = shape.num_heads,
                   .num_kv_heads = shape.num_kv_heads,
                   .head_dim = shape.head_dim,
                   .sequences = shape.sequences};
  problem.dtype = dtype;
  problem.options = options;
  return problem;
}

inline void ExpectOutputsNear(const AttentionCase& inputs,
                              const reference::Output& expected, double tolerance) {
  const AttentionGeometry& g = inputs.geometry();
  double worst = 0;
  double worst_lse = 0;
  for (int32_t head = 0; head < g.num_heads; ++head) {
    for (int64_t row = 0; row < g.total_q; ++row) {
      const int64_t at = head * g.total_q + row;
      for (int32_t d = 0; d < g.head_dim; ++d) {
        const double error =
            std::abs(inputs.O(head, row, d) - expected.o[at * g.head_dim + d]);
        ASSERT_FALSE(std::isnan(error)) << "head " << head << " row " << row;
        worst = std::max(worst, error);
      }
      const double lse_error = std::abs(inputs.Lse(head, row) - expected.lse[at]);
      ASSERT_FALSE(std::isnan(lse_error)) << "head " << head << " row " << row;
      worst_lse = std::max(worst_lse, lse_error);
    }
  }
  EXPECT_LE(worst, tolerance);
  EXPECT_LE(worst_lse, testing_support::LseTolerance(inputs.problem().dtype, false));
}

class CpuAttentionSpec : public testing::TestWithParam<Engine> {
 protected:
  ThreadPool pool_{3};
  CpuAttention attention_{pool_, GetParam().isa, GetParam().pairs};
};

}  // namespace pbs::cpu
