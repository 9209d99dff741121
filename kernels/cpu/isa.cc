#include "cpu/isa.h"

#include <cpuid.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pbs::cpu {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

StatusOr<Isa> ParseIsa(std::string_view name) {
  for (Isa isa : kAllIsas) {
    if (name == IsaName(isa)) return isa;
  }
  return InvalidArgument("isa \"" + std::string(name) +
                         "\" is not one of scalar, avx2, avx512, avx512_bf16");
}

namespace {

// Bit `bit` of register `index` (eax, ebx, ecx, edx) of a CPUID leaf: for what clang 16
// has no name in __builtin_cpu_supports.
bool CpuidBit(uint32_t leaf, uint32_t subleaf, int index, int bit) {
  uint32_t words[4] = {};
  if (__get_cpuid_count(leaf, subleaf, &words[0], &words[1], &words[2], &words[3]) == 0)
    return false;
  return (words[index] >> bit & 1) != 0;
}
bool HasF16Conversions() { return CpuidBit(1, 0, 2, 29); }
bool HasBf16Products() { return CpuidBit(7, 1, 0, 5); }

}  // namespace

bool IsSupported(Isa isa) {
  // __builtin_cpu_supports also asks the operating system (XCR0).
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    HasF16Conversions();
  const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && HasBf16Products();
  }
  return false;
}

std::vector<Isa> SupportedIsas() {
  std::vector<Isa> supported;
  for (Isa isa : kAllIsas) {
    if (IsSupported(isa)) supported.push_back(isa);
  }
  return supported;
}

}  // namespace pbs::cpu
