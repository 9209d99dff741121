// Spec: docs/KERNELS.md. The methods and options of the CUDA backend, over an emulated
// device, against the f64 reference: the table and the comparison that the CPU backend
// has (tests/support/attention_matrix.h), with blocks of 128 keys.
#include "tests/support/attention_matrix.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <vector>

#include "cuda/backend/cuda_backend.h"
#include "emulator/emulated_driver.h"
#include "tests/support/cuda_matrix.h"

namespace pbs::emulator {

using testing_support::AttentionCase;
using testing_support::MatrixComparison;
using testing_support::MatrixMethod;
using testing_support::MatrixProblem;
using testing_support::MatrixShape;

struct MatrixCase {
  MatrixMethod method;
  DType dtype;
};
void PrintTo(const MatrixCase& c, std::ostream* out) { *out << c.method.name; }

class CudaMatrixSpec : public testing::TestWithParam<MatrixCase> {
 protected:
  void Check(const MatrixShape& shape, uint32_t seed, bool head_thresholds = false) {
    AttentionProblem problem =
        MatrixProblem(shape, GetParam().dtype, GetParam().method.options);
    problem.options.coverage_rows = 2;
    problem.has_head_thresholds = head_thresholds;
    const std::string key = GetParam().method.name + " " + shape.name + " seed " +
                            std::to_string(seed) +
                            (head_thresholds ? " thresholds of heads" : "");
    SCOPED_TRACE(key);
    AttentionCase inputs(problem, seed);
    AttentionReport report;
    const Status status = Run(inputs, seed, &report);
    ASSERT_TRUE(status.ok()) << status.ToString();
    comparison_.Compare(key, inputs, report, /*pairs=*/true);
  }

  void TearDown() override {
    comparison_.ExpectFewDiffer(GetParam().method.name.c_str());
  }

 private:
  // Runs the case on a device of its own; its outputs are in the case's arrays.
  static Status Run(AttentionCase& inputs, uint32_t seed, AttentionReport* report) {
    PBS_ASSIGN_OR_RETURN(const auto backend,
                         cuda::CudaBackend::Create(std::make_unique<EmulatedDriver>(
                             EmulatedOptions{.seed = seed})));
    PBS_ASSIGN_OR_RETURN(const auto plan, backend->Plan(inputs.problem()));
    AttentionTensors tensors = inputs.Tensors();
    std::vector<Buffer> buffers;
    Status status;
    const auto on_device = [&](auto* data, int64_t bytes) {
      auto buffer = backend->Allocate(bytes);
      if (buffer.ok() && status.ok()) {
        status = backend->Upload(data, buffer->data(), bytes);
      }
      buffers.push_back(*std::move(buffer));
      return buffers.back().data();
    };
    const AttentionGeometry& g = inputs.geometry();
    const int64_t q_bytes = 2 * g.num_heads * g.total_q * g.head_dim;
    const int64_t kv_bytes = 2 * g.num_kv_heads * g.total_k * g.head_dim;
    const int64_t lse_bytes = 4 * g.num_heads * g.total_q;
    void* const o = tensors.o.data;
    void* const lse = tensors.lse.data;
    tensors.q.data = on_device(tensors.q.data, q_bytes);
    tensors.k.data = on_device(tensors.k.data, kv_bytes);
    tensors.v.data = on_device(tensors.v.data, kv_bytes);
    tensors.o.data = on_device(o, q_bytes);
    tensors.lse.data = on_device(lse, lse_bytes);
    PBS_RETURN_IF_ERROR(status);
    PBS_ASSIGN_OR_RETURN(const Buffer memory, backend->Allocate(plan->workspace_bytes));
    PBS_RETURN_IF_ERROR(backend->Run(*plan, tensors, memory.workspace(), {}));
    PBS_RETURN_IF_ERROR(backend->ReadReport(*plan, memory.workspace(),
                                            {.order = true, .lists = true}, report));
    PBS_RETURN_IF_ERROR(backend->Download(tensors.o.data, o, q_bytes));
    return backend->Download(tensors.lse.data, lse, lse_bytes);
  }

  MatrixComparison comparison_;
};

TEST_P(CudaMatrixSpec, EqualsTheReferenceOnEveryShape) {
  for (const MatrixShape& shape : testing_support::ShapesOfBlocksOf128()) {
    Check(shape, 31);
  }
}

using CudaCorrectionSpec = CudaMatrixSpec;

// The kernel of the correction is another one for each head dim.
TEST_P(CudaCorrectionSpec, EqualsTheReferenceForWideHeads) {
  Check({"head_dim_128", 2, 1, 128, {{90, 800}, {260, 520}}}, 32);
  Check({"head_dim_256", 2, 1, 256, {{150, 700}}}, 33);
}

using CudaHeadThresholdsSpec = CudaMatrixSpec;

TEST_P(CudaHeadThresholdsSpec, EqualsTheReferenceWithAThresholdForEachHead) {
  Check({"four_heads", 4, 2, 64, {{90, 650}}}, 32, /*head_thresholds=*/true);
}

// What is not tested because it is refused.
TEST(CudaMatrixRowsSpec, AllThatTheBackendRefusesAreOfThese) {
  std::set<std::string> planned;
  for (const MatrixMethod& method : testing_support::MatrixMethodsOfCuda()) {
    planned.insert(method.name);
  }
  for (const MatrixMethod& method : testing_support::MatrixMethods()) {
    EXPECT_EQ(planned.contains(method.name), !method.options.dense_fallback)
        << method.name;
  }
}

// In turn f16 and bf16: each row of the table once is what there is time for.
std::vector<MatrixCase> Cases() {
  std::vector<MatrixCase> cases;
  for (const MatrixMethod& method : testing_support::MatrixMethodsOfCuda()) {
    cases.push_back({method, cases.size() % 2 == 0 ? DType::kBF16 : DType::kF16});
  }
  return cases;
}

std::string NameOf(const testing::TestParamInfo<MatrixCase>& c) {
  return c.param.method.name;
}
INSTANTIATE_TEST_SUITE_P(Table, CudaMatrixSpec, testing::ValuesIn(Cases()), NameOf);

std::vector<MatrixCase> CorrectedCases() {
  std::vector<MatrixCase> cases = Cases();
  std::erase_if(cases, [](const auto& c) { return !c.method.options.mean_correction; });
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Table, CudaCorrectionSpec, testing::ValuesIn(CorrectedCases()),
                         NameOf);

// Each kernel that reads a threshold, and prism with a threshold of the fast band.
std::vector<MatrixCase> CasesWithThreshold() {
  std::vector<MatrixCase> cases = Cases();
  std::erase_if(cases, [](const MatrixCase& c) {
    return !std::set<std::string>{"pbs", "xattention", "xattention_published_permuted",
                                  "prism", "prism_bands"}
                .contains(c.method.name);
  });
  return cases;
}
INSTANTIATE_TEST_SUITE_P(Table, CudaHeadThresholdsSpec,
                         testing::ValuesIn(CasesWithThreshold()), NameOf);

}  // namespace pbs::emulator
