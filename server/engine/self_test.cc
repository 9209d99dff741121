#include "server/engine/self_test.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/synthetic/synthetic.h"
#include "reference/reference_attention.h"
#include "server/base/host_bytes.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

constexpr int32_t kNumHeads = 4;
constexpr int32_t kNumKvHeads = 2;
constexpr int32_t kHeadDim = 64;
constexpr int32_t kSeqLen = 333;  // odd: partial blocks and a partial segment
constexpr uint64_t kSeed = 20251021;

// Largest |o - reference| when both read the same blocks, values of standard normals:
// f32 sums of up to kSeqLen terms; outputs and probabilities rounded to 11 and 8 bits.
double OutputTolerance(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 2e-5;
    case DType::kF16:
      return 4e-3;
    case DType::kBF16:
      break;
  }
  return 3e-2;
}
// Share of the blocks that may differ from the reference's own choice: scores that are
// equal but for rounding.
constexpr double kBlocksTolerance = 0.02;

struct Case {
  std::string name;
  AttentionProblem problem;
};

std::vector<Case> Cases() {
  AttentionOptions dense;
  dense.method = Method::kDense;
  AttentionOptions pbs;
  pbs.block_size = 32;
  pbs.segment_size = 64;
  pbs.threshold = 0.7f;
  AttentionOptions query_head = pbs;
  query_head.scope = Scope::kQueryHead;
  AttentionOptions mean = pbs;
  mean.method = Method::kMeanPooling;
  const std::pair<const char*, AttentionOptions> methods[] = {
      {"dense", dense},
      {"pbs kv_head", pbs},
      {"pbs query_head", query_head},
      {"mean_pooling", mean}};

  std::vector<Case> cases;
  for (DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const auto& [name, options] : methods) {
      const AttentionShape shape = {
          kNumHeads, kNumKvHeads, kHeadDim, {{kSeqLen, kSeqLen}}};
      cases.push_back(
          {absl::StrCat(name, " ", DTypeName(dtype)), {shape, dtype, options}});
    }
  }
  return cases;
}

// The tensors of one case.
struct Operands {
  HostBytes q, k, v, o;
  AttentionTensors tensors;
};

absl::StatusOr<Operands> MakeOperands(DType dtype) {
  const int64_t row = int64_t{kSeqLen} * kHeadDim * DTypeBytes(dtype);
  Operands operands;
  PBS_ABSL_ASSIGN_OR_RETURN(operands.q, HostBytes::Allocate(kNumHeads * row));
  PBS_ABSL_ASSIGN_OR_RETURN(operands.k, HostBytes::Allocate(kNumKvHeads * row));
  PBS_ABSL_ASSIGN_OR_RETURN(operands.v, HostBytes::Allocate(kNumKvHeads * row));
  PBS_ABSL_ASSIGN_OR_RETURN(operands.o, HostBytes::Allocate(kNumHeads * row));
  const SyntheticShape shape = {kNumHeads, kNumKvHeads, kSeqLen, kHeadDim};
  const SyntheticTargets targets = {dtype, operands.q.data(), operands.k.data(),
                                    operands.v.data()};
  PBS_ABSL_RETURN_IF_ERROR(
      ToAbsl(GenerateStructured(shape, {}, kSeed, 0, targets, nullptr)));
  const RowLayout layout = PackedLayout(kSeqLen, kHeadDim);
  operands.tensors.q = {operands.q.data(), layout};
  operands.tensors.k = {operands.k.data(), layout};
  operands.tensors.v = {operands.v.data(), layout};
  operands.tensors.o = {operands.o.data(), layout};
  return operands;
}

absl::StatusOr<AttentionReport> RunBackend(AttentionBackend& backend,
                                           const AttentionProblem& problem,
                                           const AttentionTensors& tensors) {
  auto plan = backend.Plan(problem);
  if (!plan.ok()) return ToAbsl(plan.status());
  PBS_ABSL_ASSIGN_OR_RETURN(HostBytes memory,
                            HostBytes::Allocate((*plan)->workspace_bytes));
  const Workspace workspace = {memory.data(), memory.size()};
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(backend.Run(**plan, tensors, workspace, {})));
  AttentionReport report;
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(
      backend.ReadReport(**plan, workspace, {.order = true, .lists = true}, &report)));
  return report;
}

double WorstError(DType dtype, const HostBytes& o,
                  const std::vector<double>& expected) {
  double worst = 0;
  VisitDType(dtype, [&](auto element) {
    const auto* values = reinterpret_cast<const decltype(element)*>(o.data());
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = std::abs(ToFloat(values[i]) - expected[i]);
      worst = std::isnan(error) ? HUGE_VAL : std::max(worst, error);
    }
  });
  return worst;
}

// Returns the case's largest error.
absl::StatusOr<double> RunCase(AttentionBackend& backend, const Case& test) {
  const AttentionProblem& problem = test.problem;
  PBS_ABSL_ASSIGN_OR_RETURN(Operands operands, MakeOperands(problem.dtype));
  PBS_ABSL_ASSIGN_OR_RETURN(AttentionReport report,
                            RunBackend(backend, problem, operands.tensors));

  const reference::Decision chosen = {report.order, report.lists, 0};
  const reference::Output expected =
      reference::Attend(problem, operands.tensors, chosen);
  const double error = WorstError(problem.dtype, operands.o, expected.o);
  const double tolerance = OutputTolerance(problem.dtype);
  if (!(error <= tolerance)) {
    return absl::InternalError(absl::StrCat("self-test \"", test.name, "\": error ",
                                            error, " exceeds ", tolerance));
  }
  const reference::Decision own = reference::Decide(problem, operands.tensors);
  const auto blocks = static_cast<double>(report.lists.indices.size());
  const auto expected_blocks = static_cast<double>(own.lists.indices.size());
  if (std::abs(blocks - expected_blocks) > kBlocksTolerance * expected_blocks) {
    return absl::InternalError(absl::StrCat("self-test \"", test.name, "\": ", blocks,
                                            " blocks selected; the reference selects ",
                                            expected_blocks));
  }
  return error;
}

}  // namespace

absl::StatusOr<SelfTestReport> RunSelfTest(AttentionBackend& backend) {
  SelfTestReport report;
  for (const Case& test : Cases()) {
    PBS_ABSL_ASSIGN_OR_RETURN(const double error, RunCase(backend, test));
    ++report.num_cases;
    if (test.problem.dtype == DType::kF32) {
      report.worst_f32_error = std::max(report.worst_f32_error, error);
    }
  }
  return report;
}

}  // namespace pbs::server
