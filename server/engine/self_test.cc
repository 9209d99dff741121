#include "server/engine/self_test.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
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
// Share of the blocks, and of the lines of minference, that may differ from the
// reference's own choice: scores that are equal but for rounding.
constexpr double kBlocksTolerance = 0.02;

struct Case {
  std::string name;
  AttentionProblem problem;
};

struct NamedOptions {
  std::string name;
  AttentionOptions options;
};

bool HasOption(Method method, std::string_view name) {
  return (TraitsOf(method).options & FindOption(name)->bit) != 0;
}

// Options of a method that leave some blocks out.
AttentionOptions SparseOptions(Method method, int32_t block_size) {
  AttentionOptions options = DefaultOptions(method);
  options.block_size = block_size;
  if (Permutes(options)) options.segment_size = std::min(2 * block_size, 128);
  if (HasOption(method, "threshold")) options.threshold = 0.7f;
  if (HasOption(method, "gamma")) options.gamma = 0.7f;
  if (HasOption(method, "alpha")) options.alpha = 0.5f;
  if (HasOption(method, "vertical_tokens")) options.vertical_tokens = 40;
  if (HasOption(method, "slash_tokens")) options.slash_tokens = 60;
  return options;
}

// All methods that the backend has: in small blocks, and in those that every
// backend has. What options add to any method is run with one.
std::vector<NamedOptions> Methods(const std::vector<Method>& methods) {
  std::vector<NamedOptions> all;
  for (const Method method : methods) {
    const std::string name = MethodName(method);
    if (!TraitsOf(method).Selects()) {
      all.push_back({name, DefaultOptions(method)});
    } else {
      for (const int32_t block : {32, 128}) {
        const AttentionOptions options = SparseOptions(method, block);
        all.push_back({absl::StrCat(name, " block ", block), options});
        if (!Permutes(options)) continue;
        AttentionOptions query_head = options;
        query_head.scope = Scope::kQueryHead;
        all.push_back({absl::StrCat(name, " query_head block ", block), query_head});
        AttentionOptions corrected = options;
        corrected.mean_correction = true;
        all.push_back({absl::StrCat(name, " corrected block ", block), corrected});
      }
    }
  }
  const auto sorts = std::find_if(methods.begin(), methods.end(), [](Method method) {
    return HasOption(method, "permute");
  });
  if (sorts == methods.end()) return all;
  AttentionOptions sorted = SparseOptions(*sorts, 32);
  sorted.permute = true;
  sorted.segment_size = 64;
  all.push_back({absl::StrCat(MethodName(*sorts), " permuted block 32"), sorted});
  return all;
}

std::vector<Case> Cases(const std::vector<Method>& methods, DType dtype) {
  const AttentionShape shape = {kNumHeads, kNumKvHeads, kHeadDim, {{kSeqLen, kSeqLen}}};
  std::vector<Case> cases;
  for (const auto& [name, options] : Methods(methods)) {
    cases.push_back(
        {absl::StrCat(name, " ", DTypeName(dtype)), {shape, dtype, options}});
  }
  return cases;
}

// The tensors of one case, on the host and in the backend's memory.
struct Operands {
  HostBytes q, k, v, o;
  AttentionTensors tensors;
  std::vector<Buffer> buffers;
  AttentionTensors device_tensors;
};

absl::StatusOr<const void*> Upload(const HostBytes& bytes, Operands& operands,
                                   Backend& memory) {
  PBS_ABSL_ASSIGN_OR_RETURN(Buffer buffer, ToAbsl(memory.Allocate(bytes.size())));
  PBS_ABSL_RETURN_IF_ERROR(
      ToAbsl(memory.Upload(bytes.data(), buffer.data(), bytes.size())));
  operands.buffers.push_back(std::move(buffer));
  return operands.buffers.back().data();
}

absl::StatusOr<Operands> MakeOperands(DType dtype, Backend& memory) {
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
  AttentionTensors& device = operands.device_tensors;
  device = operands.tensors;
  PBS_ABSL_ASSIGN_OR_RETURN(device.q.data, Upload(operands.q, operands, memory));
  PBS_ABSL_ASSIGN_OR_RETURN(device.k.data, Upload(operands.k, operands, memory));
  PBS_ABSL_ASSIGN_OR_RETURN(device.v.data, Upload(operands.v, operands, memory));
  PBS_ABSL_ASSIGN_OR_RETURN(Buffer o, ToAbsl(memory.Allocate(operands.o.size())));
  device.o.data = o.data();
  operands.buffers.push_back(std::move(o));
  return operands;
}

absl::StatusOr<AttentionReport> RunBackend(AttentionBackend& attention, Backend& memory,
                                           const AttentionPlan& plan,
                                           Operands& operands) {
  PBS_ABSL_ASSIGN_OR_RETURN(const Buffer workspace,
                            ToAbsl(memory.Allocate(plan.workspace_bytes)));
  PBS_ABSL_RETURN_IF_ERROR(
      ToAbsl(attention.Run(plan, operands.device_tensors, workspace.workspace(), {})));
  AttentionReport report;
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(attention.ReadReport(
      plan, workspace.workspace(), {.order = true, .lists = true}, &report)));
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(memory.Download(
      operands.device_tensors.o.data, operands.o.data(), operands.o.size())));
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

// Both choose the same columns and distances.
absl::Status CheckLines(const std::string& name, const std::vector<ChosenLines>& lines,
                        const std::vector<ChosenLines>& expected) {
  if (lines.size() != expected.size()) {
    return absl::InternalError(absl::StrCat(
        "self-test \"", name, "\": lines of ", lines.size(),
        " heads chosen; the reference chooses those of ", expected.size()));
  }
  size_t total = 0;
  std::vector<int32_t> missing;
  const auto compare = [&](const std::vector<int32_t>& theirs,
                           const std::vector<int32_t>& ours) {
    total += theirs.size();
    std::set_difference(theirs.begin(), theirs.end(), ours.begin(), ours.end(),
                        std::back_inserter(missing));
  };
  for (size_t i = 0; i < lines.size(); ++i) {
    compare(expected[i].columns, lines[i].columns);
    compare(expected[i].distances, lines[i].distances);
  }
  const auto differ = static_cast<double>(missing.size());
  if (differ > kBlocksTolerance * static_cast<double>(total)) {
    return absl::InternalError(
        absl::StrCat("self-test \"", name, "\": ", missing.size(), " of ", total,
                     " columns and distances of the reference are not chosen"));
  }
  return absl::OkStatus();
}

// Returns the case's largest error.
absl::StatusOr<double> RunCase(AttentionBackend& attention, Backend& memory,
                               const Case& test) {
  const AttentionProblem& problem = test.problem;
  PBS_ABSL_ASSIGN_OR_RETURN(const std::unique_ptr<AttentionPlan> plan,
                            ToAbsl(attention.Plan(problem)));
  PBS_ABSL_ASSIGN_OR_RETURN(Operands operands, MakeOperands(problem.dtype, memory));
  PBS_ABSL_ASSIGN_OR_RETURN(AttentionReport report,
                            RunBackend(attention, memory, *plan, operands));

  const reference::Output expected =
      reference::Attend(problem, operands.tensors, reference::DecisionOf(report));
  const double error = WorstError(problem.dtype, operands.o, expected.o);
  const double tolerance = OutputTolerance(problem.dtype);
  if (!(error <= tolerance)) {
    return absl::InternalError(absl::StrCat("self-test \"", test.name, "\": error ",
                                            error, " exceeds ", tolerance));
  }
  const reference::Decision own = reference::Decide(problem, operands.tensors);
  PBS_ABSL_RETURN_IF_ERROR(CheckLines(test.name, report.lines, own.lines));
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

absl::StatusOr<SelfTestReport> RunSelfTest(AttentionBackend& attention,
                                           Backend& memory) {
  SelfTestReport report;
  for (const DType dtype : memory.info().dtypes) {
    const int32_t before = report.num_cases;
    absl::Status missing;
    for (const Case& test : Cases(memory.info().methods, dtype)) {
      const absl::StatusOr<double> error = RunCase(attention, memory, test);
      if (absl::IsUnimplemented(error.status())) {
        missing = error.status();
        continue;
      }
      PBS_ABSL_RETURN_IF_ERROR(error.status());
      ++report.num_cases;
      if (dtype == DType::kF32) {
        report.worst_f32_error = std::max(report.worst_f32_error, *error);
      }
    }
    if (report.num_cases == before) return missing;
  }
  return report;
}

}  // namespace pbs::server
