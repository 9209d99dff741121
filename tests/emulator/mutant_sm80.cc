// The Ampere attention of this build (mutant_check.h).
#include "tests/emulator/mutant_check.h"

int main() {
  using pbs::cuda::Bf16Element;
  using pbs::cuda::Sm80Config;
  namespace emulator = pbs::emulator;
  const bool right =
      emulator::AttendsRight(
          emulator::RunSm80<Sm80Config<Bf16Element, 96>>,
          {.head_dim = 96, .heads = 1, .sequences = {{130, 130}, {70, 333}}}, 2) &&
      emulator::AttendsRight(
          emulator::RunSm80<Sm80Config<Bf16Element, 96>>,
          {.head_dim = 96, .sequences = {{300, 800}}, .density = 0.9, .parts = true},
          2) &&
      emulator::AttendsRight(emulator::RunSm80<Sm80Config<Bf16Element, 256>>,
                             {.head_dim = 256, .heads = 1, .sequences = {{70, 333}}},
                             1);
  return right ? 0 : 1;
}
