// The kernels of minference in this build (mutant_run.h).
#include <vector>

#include "tests/emulator/mutant_run.h"

namespace pbs::emulator {
namespace {

// Lists of parts of blocks, and gathered columns: of two blocks, then with blocks that
// are read whole, then of sorted keys, then beside means.
std::vector<AttentionProblem> LineProblems() {
  return {{{4, 2, 64, {{300, 900}, {400, 410}}},
           DType::kBF16,
           {.method = Method::kMInference,
            .coverage_rows = 9,
            .vertical_tokens = 150,
            .slash_tokens = 120}},
          {{2, 1, 64, {{700, 900}}},
           DType::kBF16,
           {.method = Method::kMInference,
            .coverage_rows = 3,
            .dense_tail_blocks = 1,
            .sink_blocks = 1,
            .window_blocks = 2,
            .vertical_tokens = 60,
            .slash_tokens = 52}},
          {{2, 1, 64, {{800, 1000}}},
           DType::kBF16,
           {.method = Method::kMInference,
            .coverage_rows = 3,
            .permute = true,
            .as_published = true,
            .vertical_tokens = 200,
            .slash_tokens = 110}},
          {{2, 2, 64, {{200, 1400}, {150, 700}}},
           DType::kBF16,
           {.method = Method::kMInference,
            .mean_correction = true,
            .vertical_tokens = 34,
            .slash_tokens = 52}}};
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  for (uint32_t seed : {1u, 2u}) {
    for (const pbs::AttentionProblem& problem : pbs::emulator::LineProblems()) {
      if (!pbs::emulator::RunsRight<64>(problem, seed)) return 1;
    }
  }
  return 0;
}
