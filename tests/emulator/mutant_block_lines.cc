// The kernels of flexprefill in this build (mutant_run.h).
#include <vector>

#include "tests/emulator/mutant_run.h"

namespace pbs::emulator {
namespace {

// Heads by lines and by their block means.
std::vector<AttentionProblem> FlexPrefillProblems() {
  AttentionOptions lines = DefaultOptions(Method::kFlexPrefill);
  lines.gamma = 0.9f;
  lines.tau = 0;
  lines.coverage_rows = 2;
  AttentionOptions means = lines;
  means.force_first_block = false;
  means.gamma = 0.6f;
  means.tau = 1;
  std::vector<AttentionProblem> problems = {
      // A chunk for each block of keys, and 60 queries in a tile of 128.
      {{4, 1, 64, {{200, 500}, {60, 600}}}, DType::kBF16, lines},
      {{2, 1, 64, {{900, 900}}}, DType::kBF16, means}};
  // A last block of one key.
  AttentionOptions either = lines;
  either.tau = 0.3f;
  problems.push_back({{4, 1, 64, {{513, 513}}}, DType::kBF16, either});
  lines.permute = means.permute = true;
  problems.push_back({{2, 1, 64, {{900, 1024}}}, DType::kBF16, lines});
  problems.push_back({{4, 2, 64, {{700, 700}, {300, 1000}}}, DType::kBF16, means});
  return problems;
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  for (const pbs::AttentionProblem& problem : pbs::emulator::FlexPrefillProblems()) {
    if (!pbs::emulator::RunsRight<64>(problem, 1)) return 1;
  }
  return 0;
}
