// The mean correction and the guard in this build (mutant_run.h).
#include <vector>

#include "tests/emulator/mutant_run.h"

namespace pbs::emulator {
namespace {

std::vector<AttentionProblem> Problems() {
  return {// More means than are in shared memory together.
          {{2, 2, 64, {{20, 4400}, {150, 600}}},
           DType::kBF16,
           {.method = Method::kMeanPooling,
            .threshold = 0.1f,
            .force_first_block = false,
            .mean_correction = true}},
          {{2, 1, 64, {{30, 600}, {140, 900}}},
           DType::kBF16,
           {.threshold = 0.1f, .force_first_block = false, .mean_correction = true}},
          // Some heads keep too little of one sequence or of the other.
          {{4, 2, 64, {{300, 700}, {140, 600}}},
           DType::kBF16,
           {.method = Method::kXAttention,
            .threshold = 0.3f,
            .coverage_rows = 5,
            .coverage_min = 0.5f}}};
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  for (uint32_t seed : {1u, 2u}) {
    for (const pbs::AttentionProblem& problem : pbs::emulator::Problems()) {
      if (!pbs::emulator::RunsRight<64>(problem, seed)) return 1;
    }
  }
  return 0;
}
