// Instruction sets of the CPU backend, picked at run time.
//
// Each ISA has a table of tile kernels (tile_kernels.h) compiled with its own flags;
// code built for one ISA runs only after IsSupported() said so.
#pragma once

#include <string_view>
#include <vector>

#include "pbs/status.h"

namespace pbs::cpu {

enum class Isa {
  kScalar,      // any x86-64
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // and AVX512-BF16: bf16 operands multiplied as pairs
};

// "scalar", "avx2", "avx512", "avx512_bf16".
const char* IsaName(Isa isa);
// InvalidArgument that names the accepted spellings.
StatusOr<Isa> ParseIsa(std::string_view name);

// Whether this CPU and operating system can run `isa`.
bool IsSupported(Isa isa);

// What this machine supports, ascending; kScalar is always there.
std::vector<Isa> SupportedIsas();

}  // namespace pbs::cpu
