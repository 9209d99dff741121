// Spec: pbs/attention.h: sequences of one run know nothing of each other. NaN and Inf
// in the keys and values of one never reach another, not even with weight 0: for every
// table of the CPU backend.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/attention_matrix.h"
#include "tests/support/case_name.h"
#include "tests/unit/kernels/cpu_attention_fixture.h"

namespace pbs::cpu {
namespace {

using testing_support::MatrixMethod;

enum class Layout { kPacked, kTokenMajor, kBatch };

constexpr std::pair<const char*, Layout> kLayouts[] = {
    {"packed", Layout::kPacked},
    {"token_major", Layout::kTokenMajor},
    {"batch", Layout::kBatch}};

struct Tensor {
  std::vector<uint8_t> bytes;  // NaN where there is no row
  RowLayout layout;
};

// The inputs of an AttentionCase in any layout, to be spoiled.
class SharedRun {
 public:
  SharedRun(const AttentionProblem& problem, Layout layout)
      : problem_(problem), g_(MakeGeometry(problem)) {
    AttentionCase inputs(problem, 3);
    const AttentionTensors packed = inputs.Tensors();
    q_ = Place(packed.q, g_.num_heads, layout, /*of_queries=*/true);
    k_ = Place(packed.k, g_.num_kv_heads, layout, /*of_queries=*/false);
    v_ = Place(packed.v, g_.num_kv_heads, layout, /*of_queries=*/false);
    o_ = {std::vector<uint8_t>(q_.bytes.size(), 0xFF), q_.layout};
    lse_.assign(static_cast<size_t>(g_.num_heads * g_.total_q), NAN);
  }

  void SpoilKeys(int32_t sequence) { Spoil(k_, sequence); }
  void SpoilValues(int32_t sequence) { Spoil(v_, sequence); }

  Status Run(CpuAttention& attention) {
    AttentionTensors tensors;
    tensors.q = {q_.bytes.data(), q_.layout};
    tensors.k = {k_.bytes.data(), k_.layout};
    tensors.v = {v_.bytes.data(), v_.layout};
    tensors.o = {o_.bytes.data(), o_.layout};
    tensors.lse = {lse_.data(), PackedLayout(g_.total_q, 1)};
    return RunOn(attention, problem_, tensors).status;
  }

  // Of one sequence: the bits of o, and lse.
  std::vector<uint8_t> Outputs(int32_t sequence) const {
    const SequenceGeometry& s = g_.sequences[sequence];
    std::vector<uint8_t> outputs;
    for (int32_t head = 0; head < g_.num_heads; ++head) {
      for (int32_t row = 0; row < s.q_len; ++row) {
        const uint8_t* o =
            o_.bytes.data() +
            o_.layout.Offset(sequence, s.q_begin, head, row) * element_bytes();
        outputs.insert(outputs.end(), o, o + row_bytes());
        const auto* lse = reinterpret_cast<const uint8_t*>(
            &lse_[static_cast<size_t>(head * g_.total_q + s.q_begin + row)]);
        outputs.insert(outputs.end(), lse, lse + sizeof(float));
      }
    }
    return outputs;
  }

 private:
  int64_t element_bytes() const { return DTypeBytes(problem_.dtype); }
  int64_t row_bytes() const { return g_.head_dim * element_bytes(); }
  int32_t Rows(int32_t sequence, bool of_queries) const {
    return of_queries ? g_.sequences[sequence].q_len : g_.sequences[sequence].k_len;
  }

  Tensor Place(const ConstRows& packed, int64_t heads, Layout layout,
               bool of_queries) const {
    const auto num_sequences = static_cast<int32_t>(g_.sequences.size());
    int64_t total = 0;
    int64_t longest = 0;
    for (int32_t n = 0; n < num_sequences; ++n) {
      total += Rows(n, of_queries);
      longest = std::max<int64_t>(longest, Rows(n, of_queries));
    }
    Tensor placed;
    placed.layout = layout == Layout::kPacked ? PackedLayout(total, g_.head_dim)
                    : layout == Layout::kTokenMajor
                        ? TokenMajorLayout(heads * g_.head_dim, g_.head_dim)
                        : DenseBatchLayout(heads, longest, g_.head_dim);
    const int64_t rows = layout == Layout::kBatch ? num_sequences * longest : total;
    placed.bytes.assign(static_cast<size_t>(rows * heads * row_bytes()), 0xFF);
    int64_t before = 0;
    for (int32_t n = 0; n < num_sequences; ++n) {
      for (int32_t head = 0; head < heads; ++head) {
        for (int32_t row = 0; row < Rows(n, of_queries); ++row) {
          std::memcpy(placed.bytes.data() +
                          placed.layout.Offset(n, before, head, row) * element_bytes(),
                      static_cast<const uint8_t*>(packed.data) +
                          packed.layout.Offset(n, before, head, row) * element_bytes(),
                      static_cast<size_t>(row_bytes()));
        }
      }
      before += Rows(n, of_queries);
    }
    return placed;
  }

  // NaN, Inf and -Inf in turn, in all of its rows.
  void Spoil(Tensor& tensor, int32_t sequence) const {
    constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
    const SequenceGeometry& s = g_.sequences[sequence];
    for (int32_t head = 0; head < g_.num_kv_heads; ++head) {
      for (int32_t row = 0; row < s.k_len; ++row) {
        std::vector<float> bad(static_cast<size_t>(g_.head_dim));
        for (int32_t d = 0; d < g_.head_dim; ++d) bad[d] = kBad[(row + d) % 3];
        ConvertElements(
            bad.data(), DType::kF32,
            tensor.bytes.data() +
                tensor.layout.Offset(sequence, s.k_begin, head, row) * element_bytes(),
            problem_.dtype, g_.head_dim);
      }
    }
  }

  const AttentionProblem problem_;
  const AttentionGeometry g_;
  Tensor q_, k_, v_, o_;
  std::vector<float> lse_;
};

// Short prompts that share a run, and longer ones that end inside blocks.
const std::vector<SequenceShape> kBatches[] = {
    {{37, 37}, {1, 1}, {150, 150}, {64, 64}, {200, 200}},
    {{300, 300}, {130, 420}, {90, 90}}};

std::vector<MatrixMethod> Methods() {
  std::vector<MatrixMethod> methods = testing_support::SelectingMethods();
  methods.push_back({"dense", {.method = Method::kDense}});
  methods.push_back({"pbs_block_128", {.threshold = 0.5f}});
  MatrixMethod query_heads = methods[0];
  query_heads.name = "pbs_query_head";
  query_heads.options.scope = Scope::kQueryHead;
  methods.push_back(query_heads);
  MatrixMethod corrected = methods[0];
  corrected.name = "pbs_corrected";
  corrected.options.mean_correction = true;
  methods.push_back(corrected);
  return methods;
}

using CpuIsolationSpec = CpuAttentionSpec;

// Calls body(problem, layout) for all of the above.
template <class Body>
void ForEachRun(Body&& body) {
  for (const auto& [method, options] : Methods()) {
    for (const auto& sequences : kBatches) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        for (const auto& [name, layout] : kLayouts) {
          SCOPED_TRACE(testing::Message()
                       << method << ", " << sequences.size() << " sequences, "
                       << DTypeName(dtype) << ", " << name);
          body(MakeProblem({"", 4, 2, 64, sequences}, dtype, options), layout);
        }
      }
    }
  }
}

TEST_P(CpuIsolationSpec, BadValuesOfASequenceChangeNoBitOfAnother) {
  ForEachRun([&](const AttentionProblem& problem, Layout layout) {
    SharedRun clean(problem, layout);
    ASSERT_TRUE(clean.Run(attention_).ok());
    const auto num_sequences = static_cast<int32_t>(problem.shape.sequences.size());
    for (int32_t spoiled = 0; spoiled < num_sequences; ++spoiled) {
      SharedRun run(problem, layout);
      run.SpoilValues(spoiled);
      ASSERT_TRUE(run.Run(attention_).ok());
      for (int32_t n = 0; n < num_sequences; ++n) {
        EXPECT_EQ(run.Outputs(n) == clean.Outputs(n), n != spoiled)
            << "sequence " << n << " beside " << spoiled;
      }
    }
  });
}

// Dense attention passes them on, to nobody else; the other methods refuse the run.
TEST_P(CpuIsolationSpec, BadKeysOfASequenceChangeNoBitOfAnotherOrAreRefused) {
  ForEachRun([&](const AttentionProblem& problem, Layout layout) {
    SharedRun clean(problem, layout);
    ASSERT_TRUE(clean.Run(attention_).ok());
    const auto num_sequences = static_cast<int32_t>(problem.shape.sequences.size());
    for (int32_t spoiled = 0; spoiled < num_sequences; ++spoiled) {
      SharedRun run(problem, layout);
      run.SpoilKeys(spoiled);
      run.SpoilValues(spoiled);
      const Status status = run.Run(attention_);
      if (problem.options.method != Method::kDense) {
        EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
        continue;
      }
      ASSERT_TRUE(status.ok());
      for (int32_t n = 0; n < num_sequences; ++n) {
        EXPECT_EQ(run.Outputs(n) == clean.Outputs(n), n != spoiled)
            << "sequence " << n << " beside " << spoiled;
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Tables, CpuIsolationSpec, testing::ValuesIn(RunnableEngines()),
                         testing_support::CaseName());

}  // namespace
}  // namespace pbs::cpu
