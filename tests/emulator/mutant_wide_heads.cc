// Kernels of head dim 256 in this build (mutant_run.h): keys of wide heads have one
// buffer, and the correction has fewer rows.
#include <vector>

#include "tests/emulator/mutant_run.h"

namespace pbs::emulator {
namespace {

std::vector<AttentionProblem> Problems() {
  return {
      {{1, 1, 256, {{20, 520}}}, DType::kBF16, {.threshold = 0.6f, .coverage_rows = 2}},
      {{1, 1, 256, {{130, 600}}},
       DType::kBF16,
       {.method = Method::kFlashPrefill, .coverage_rows = 2, .alpha = 0.3f}},
      {{1, 1, 256, {{130, 600}}},
       DType::kBF16,
       {.method = Method::kMeanPooling,
        .threshold = 0.1f,
        .force_first_block = false,
        .mean_correction = true}}};
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  for (uint32_t seed : {1u, 2u}) {
    for (const pbs::AttentionProblem& problem : pbs::emulator::Problems()) {
      if (!pbs::emulator::RunsRight<256>(problem, seed)) return 1;
    }
  }
  return 0;
}
