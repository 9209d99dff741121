// Instruction sets of the CPU backend, chosen at run time.
//
// Each ISA has a table of tile kernels (tile_kernels.h) that is compiled with its own
// flags. Code of an ISA may run only when IsSupported() is true.
#pragma once

#include <string_view>
#include <vector>

#include "pbs/status.h"

namespace pbs::cpu {

enum class Isa {
  kScalar,      // any x86-64
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // kAvx512 and AVX512-BF16: bf16 operands multiplied as pairs
};

// "scalar", "avx2", "avx512", "avx512_bf16".
const char* IsaName(Isa isa);
// The inverse; InvalidArgument names the accepted spellings.
StatusOr<Isa> ParseIsa(std::string_view name);

// True when this CPU and operating system can run `isa`.
bool IsSupported(Isa isa);

// The supported ISAs of this machine, ascending; always includes kScalar.
std::vector<Isa> SupportedIsas();

}  // namespace pbs::cpu
