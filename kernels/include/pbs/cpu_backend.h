// The CPU backend: oneTBB threads, attention kernels of this project, oneDNN linear
// layers.
//
// Threading and memory: as pbs/backend.h. Calls return when the work is done. Creating
// a backend sets the OpenMP thread count of the calling thread and of the backend's
// workers to 1 (oneDNN as packaged is built on OpenMP; the workers are oneTBB's).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs {

enum class ComputePreference : uint8_t {
  kAuto,  // bf16 weights multiply as bf16 where that is measured faster, else as f32
  kF32,
  kBf16,  // bf16 weights multiply as bf16 even where that is slower
};

// "auto", "f32", "bf16".
StatusOr<ComputePreference> ParseComputePreference(const std::string& name);

struct CpuBackendOptions {
  // Workers, the calling thread included: 1 .. kCpuThreadsMax; 0 takes the number of
  // CPUs in the affinity mask. The caller takes a container's CPU quota into account.
  int32_t num_threads = 0;
  // "auto" or a name of cpu/isa.h: the highest instruction set for attention and
  // pointwise steps. Linear layers use what oneDNN detects (its environment variable
  // ONEDNN_MAX_CPU_ISA limits them).
  std::string isa = "auto";
  ComputePreference compute = ComputePreference::kAuto;
};

inline constexpr int32_t kCpuThreadsMax = 1024;

// InvalidArgument names the option and the accepted values; FailedPrecondition when
// this CPU lacks the requested ISA or bf16 products.
StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuBackendOptions& options);

}  // namespace pbs
