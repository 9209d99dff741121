// The Hopper attention of this build (mutant_check.h).
#include "tests/emulator/mutant_check.h"

int main() {
  using pbs::cuda::Bf16Element;
  using pbs::cuda::Sm90Config;
  namespace emulator = pbs::emulator;
  const bool right =
      emulator::AttendsRight(emulator::RunSm90<Sm90Config<Bf16Element, 64, 2, true>>,
                             {.head_dim = 64,
                              .heads = 2,
                              .kv_heads = 1,
                              .sequences = {{130, 130}, {70, 333}}},
                             2) &&
      emulator::AttendsRight(
          emulator::RunSm90<Sm90Config<Bf16Element, 128, 2, true>>,
          {.heads = 2, .kv_heads = 2, .sequences = {{640, 640}}, .density = 0.9}, 1);
  return right ? 0 : 1;
}
