#include "cpu/cpu_backend.h"

#include <cpuid.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "common/host_memory.h"
#include "cpu/linear_calibration.h"
#include "cpu/pointwise.h"
#include "pbs/check.h"
#include "pbs/cpu_backend.h"

namespace pbs::cpu {
namespace {

// The processor's brand string, without its padding.
std::string ProcessorName() {
  unsigned words[12] = {};
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned* part = words + 4 * leaf;
    if (__get_cpuid(0x80000002u + leaf, part, part + 1, part + 2, part + 3) == 0) {
      return "x86-64";
    }
  }
  char text[sizeof(words) + 1] = {};
  std::memcpy(text, words, sizeof(words));
  std::string name(text);
  name.erase(0, name.find_first_not_of(' '));
  name.erase(name.find_last_not_of(' ') + 1);
  return name;
}

int32_t AffinityCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::clamp(CPU_COUNT(&set), 1, kCpuThreadsMax);
}

StatusOr<Isa> PickIsa(const std::string& name) {
  if (name == "auto") return SupportedIsas().back();
  StatusOr<Isa> isa = ParseIsa(name);
  if (!isa.ok()) {
    return InvalidArgument("isa \"" + name +
                           "\" is not one of auto, scalar, avx2, avx512, avx512_bf16");
  }
  if (!IsSupported(*isa)) {
    return FailedPrecondition("isa \"" + name + "\" is not supported by this CPU (" +
                              ProcessorName() + "), which has " +
                              IsaName(SupportedIsas().back()));
  }
  return isa;
}

}  // namespace

CpuBackend::CpuBackend(int32_t num_threads, Isa isa, bool bf16_products,
                       double bf16_speedup)
    : pool_(num_threads),
      pointwise_(PointwiseFor(isa)),
      bf16_products_(bf16_products),
      linear_(pool_, pointwise_),
      attention_(pool_, isa, bf16_products),
      info_{.name = "cpu",
            .isa = IsaName(isa),
            .device = ProcessorName(),
            .num_threads = num_threads,
            .bf16_speedup = bf16_speedup,
            .head_dims = {kHeadDims.begin(), kHeadDims.end()},
            .dtypes = {DType::kF32, DType::kF16, DType::kBF16},
            .methods = {kMethods.begin(), kMethods.end()}} {}

DType CpuBackend::ComputeDType(DType stored) const {
  return stored == DType::kBF16 && bf16_products_ ? DType::kBF16 : DType::kF32;
}

StatusOr<Buffer> CpuBackend::Allocate(int64_t bytes) { return AllocatePages(bytes); }

Status CpuBackend::Upload(const void* source, void* target, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
  return OkStatus();
}

Status CpuBackend::Download(const void* source, void* target, int64_t bytes) {
  std::memcpy(target, source, static_cast<size_t>(bytes));
  return OkStatus();
}

StatusOr<std::unique_ptr<PackedLinear>> CpuBackend::PackLinear(
    const LinearSpec& spec, const RowReader& read, std::span<const float> bias) {
  return linear_.Pack(spec, read, bias);
}

int64_t CpuBackend::LinearWorkspaceBytes(const PackedLinear& linear, int64_t) const {
  return linear_.WorkspaceBytes(linear);
}

Status CpuBackend::Linear(const PackedLinear& linear, const void* x, int64_t rows,
                          void* y, Workspace workspace) {
  return linear_.Run(linear, x, rows, y, workspace);
}

Status CpuBackend::Embed(const EmbedOp& op) {
  cpu::Embed(pool_, pointwise_, op);
  return OkStatus();
}

Status CpuBackend::Rotations(const RotationsOp& op) {
  cpu::Rotations(pool_, op);
  return OkStatus();
}

Status CpuBackend::RmsNorm(const RmsNormOp& op) {
  cpu::RmsNorm(pool_, pointwise_, op);
  return OkStatus();
}

Status CpuBackend::Qkv(const QkvOp& op) {
  PBS_CHECK(op.pooled_queries == nullptr);  // no plan of this backend takes them
  cpu::Qkv(pool_, pointwise_, op);
  return OkStatus();
}

Status CpuBackend::Logits(const LogitsOp& op) {
  cpu::Logits(pool_, pointwise_, op);
  return OkStatus();
}

Status CpuBackend::CopyRows(const CopyRowsOp& op) {
  cpu::CopyRows(pool_, pointwise_, op);
  return OkStatus();
}

StatusOr<std::unique_ptr<AttentionPlan>> CpuBackend::Plan(
    const AttentionProblem& problem) const {
  return attention_.Plan(problem);
}

Status CpuBackend::Run(const AttentionPlan& plan, const AttentionTensors& tensors,
                       Workspace workspace, const RunControl& control) {
  return attention_.Run(plan, tensors, workspace, control);
}

Status CpuBackend::ReadReport(const AttentionPlan& plan, Workspace workspace,
                              const ReportRequest& request, AttentionReport* report) {
  return attention_.ReadReport(plan, workspace, request, report);
}

Status CpuBackend::StartReport(const AttentionPlan& plan, Workspace workspace) {
  return attention_.StartReport(plan, workspace);
}

Status CpuBackend::FinishReport(const AttentionPlan& plan, AttentionReport* report) {
  return attention_.FinishReport(plan, report);
}

Status CpuBackend::MarkTime(int mark) {
  PBS_CHECK(mark >= 0 && mark < kTimeMarks);
  marks_[mark] = std::chrono::steady_clock::now();
  return OkStatus();
}

StatusOr<double> CpuBackend::SecondsBetween(int from, int to) {
  PBS_CHECK(from >= 0 && from < kTimeMarks && to >= 0 && to < kTimeMarks);
  return std::chrono::duration<double>(marks_[to] - marks_[from]).count();
}

}  // namespace pbs::cpu

namespace pbs {

StatusOr<ComputePreference> ParseComputePreference(const std::string& name) {
  if (name == "auto") return ComputePreference::kAuto;
  if (name == "f32") return ComputePreference::kF32;
  if (name == "bf16") return ComputePreference::kBf16;
  return InvalidArgument("compute \"" + name + "\" is not one of auto, f32, bf16");
}

StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options) {
  if (options.num_threads < 0 || options.num_threads > kCpuThreadsMax) {
    return InvalidArgument("num_threads " + std::to_string(options.num_threads) +
                           " is outside [0, " + std::to_string(kCpuThreadsMax) + "]");
  }
  PBS_ASSIGN_OR_RETURN(const cpu::Isa isa, cpu::PickIsa(options.isa));
  const bool has_bf16 = isa == cpu::Isa::kAvx512Bf16;
  if (options.compute == ComputePreference::kBf16 && !has_bf16) {
    return FailedPrecondition("compute bf16 needs isa avx512_bf16, not " +
                              std::string(cpu::IsaName(isa)));
  }
  double speedup = 0;
  if (has_bf16 && options.compute != ComputePreference::kF32) {
    speedup = cpu::MeasureBf16Speedup();
    if (options.compute == ComputePreference::kBf16 && speedup == 0) {
      return FailedPrecondition(
          "compute bf16 needs a bf16 product, and oneDNN has none");
    }
  }
  const bool bf16_products =
      options.compute == ComputePreference::kBf16 ||
      (options.compute == ComputePreference::kAuto && speedup >= cpu::kBf16SpeedupMin);
  const int32_t num_threads =
      options.num_threads == 0 ? cpu::AffinityCpus() : options.num_threads;
  return StatusOr<std::unique_ptr<Backend>>(
      std::make_unique<cpu::CpuBackend>(num_threads, isa, bf16_products, speedup));
}

}  // namespace pbs
