// Runs the Hopper attention of this build on the emulator and tells whether anything is
// wrong with it. check_mutants.py builds it from sources with one planted defect each.
//
// Exit status: 0 when every case equals the exact answer, 1 when not (the fault or the
// error on stdout).
#include <cstdio>

#include "cuda/attention/attention_sm90.h"
#include "tests/emulator/attention_case.h"

namespace pbs::emulator {
namespace {

template <class Config>
bool IsRight(AttentionSetting setting, int blocks) {
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    setting.seed = seed;
    AttentionCase attention(setting);
    const cuda::AttentionParams params = attention.Params();
    const cuda::Sm90Operands operands = {attention.QMap(), attention.KMap(),
                                         attention.VMap()};
    const Fault fault = Launch({.blocks = blocks,
                                .threads = Config::kThreads,
                                .resident_blocks = blocks,
                                .shared_bytes = sizeof(cuda::Sm90Shared<Config>),
                                .seed = seed},
                               [&] { cuda::AttendSm90<Config>(params, operands); });
    if (!fault.ok()) {
      std::printf("%s\n", fault.ToString().c_str());
      return false;
    }
    const AttentionCase::Errors errors = attention.Compare();
    // Not "greater": NaN is wrong too.
    if (!(errors.o <= 2e-2 && errors.lse <= 1e-5)) {
      std::printf("wrong by %.2g in o, %.2g in lse\n", errors.o, errors.lse);
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  using pbs::cuda::Bf16Element;
  using pbs::cuda::Sm90Config;
  const bool right =
      pbs::emulator::IsRight<Sm90Config<Bf16Element, 64, 2, true>>(
          {.head_dim = 64,
           .heads = 2,
           .kv_heads = 1,
           .sequences = {{130, 130}, {70, 333}}},
          2) &&
      pbs::emulator::IsRight<Sm90Config<Bf16Element, 128, 2, true>>(
          {.heads = 2, .kv_heads = 2, .sequences = {{640, 640}}, .density = 0.9}, 1);
  return right ? 0 : 1;
}
