// The Hopper attention of this build (mutant_check.h).
#include "cuda/attention/sm90_variants.h"
#include "tests/emulator/mutant_check.h"

namespace {

using pbs::cuda::AttentionVariant;

template <int kHeadDim, AttentionVariant kVariant = AttentionVariant::kChosen>
bool Right(const pbs::emulator::AttentionSetting& setting, int blocks) {
  using Config = pbs::cuda::Sm90Config<pbs::cuda::Bf16Element, kHeadDim,
                                       pbs::cuda::Sm90OptionsOf(kHeadDim, kVariant)>;
  return pbs::emulator::AttendsRight(pbs::emulator::RunSm90<Config>, setting, blocks);
}

}  // namespace

int main() {
  const bool right =
      Right<64>({.head_dim = 64,
                 .heads = 2,
                 .kv_heads = 1,
                 .sequences = {{130, 130}, {70, 333}}},
                2) &&
      Right<128>({.heads = 2, .kv_heads = 2, .sequences = {{640, 640}}, .density = 0.9},
                 1) &&
      // Tiles of masked blocks alone.
      Right<64>({.head_dim = 64,
                 .heads = 4,
                 .kv_heads = 2,
                 .sequences = {{256, 256}, {200, 200}, {130, 130}, {256, 256}}},
                1) &&
      Right<64>({.head_dim = 64,
                 .sequences = {{70, 130}, {50, 50}, {200, 200}},
                 .arithmetic_lists = true,
                 .poisoned = 1},
                1) &&
      Right<64>(
          {.head_dim = 64, .sequences = {{300, 800}}, .density = 0.9, .parts = true},
          1) &&
      Right<64, AttentionVariant::kDirectOutputs>(
          {.head_dim = 64, .sequences = {{300, 300}}}, 1);
  return right ? 0 : 1;
}
