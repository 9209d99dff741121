// For programs that check kernels. check_mutants.py builds them from sources with one
// planted defect each. Exit status 0: every case equals the exact result; 1: one does
// not (the fault or the error is on stdout).
#pragma once

#include <cstdio>

#include "tests/emulator/attention_run.h"

namespace pbs::emulator {

using AttentionRun = Fault (*)(AttentionCase&, uint32_t, int);

inline bool AttendsRight(AttentionRun run, AttentionSetting setting, int blocks) {
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    setting.seed = seed;
    AttentionCase attention(setting);
    const Fault fault = run(attention, seed, blocks);
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

}  // namespace pbs::emulator
