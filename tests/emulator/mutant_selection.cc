// The kernels around attention in this build (mutant_run.h), and orders of tiles.
#include <string>
#include <vector>

#include "tests/emulator/mutant_run.h"
#include "tests/emulator/tile_order_case.h"

namespace pbs::emulator {
namespace {

bool OrdersTilesRight(uint32_t seed) {
  for (const TileOrderSetting& setting : TileOrderSettings()) {
    TileOrderCase tiles(setting.problem, setting.density, seed, setting.wide_tiles);
    const std::string wrong = tiles.Run(seed);
    if (!wrong.empty()) return Says(setting.name + (": " + wrong));
  }
  return true;
}

std::vector<AttentionProblem> Problems() {
  return {{{2, 1, 64, {{200, 800}, {130, 130}}},
           DType::kBF16,
           {.threshold = 0.6f, .coverage_rows = 10}},
          // Never falls back, but has a section of tiles for each head.
          {{2, 2, 64, {{600, 600}}},
           DType::kBF16,
           {.method = Method::kMeanPooling,
            .threshold = 0.3f,
            .dense_fallback = true,
            .coverage_rows = 3}},
          // Few blocks are selected, and others are forced.
          {{2, 1, 64, {{200, 900}}},
           DType::kBF16,
           {.method = Method::kMeanPooling,
            .threshold = 0.05f,
            .force_first_block = false,
            .coverage_rows = 2,
            .dense_tail_blocks = 1,
            .sink_blocks = 1,
            .window_blocks = 2}},
          {{4, 2, 64, {{500, 900}, {400, 800}}},
           DType::kBF16,
           {.method = Method::kPrism,
            .threshold = 0.5f,
            .coverage_rows = 2,
            .fast_threshold = 0.2f}},
          {.shape = {4, 2, 64, {{500, 900}}},
           .dtype = DType::kBF16,
           .options = {.method = Method::kPrism,
                       .coverage_rows = 2,
                       .fast_threshold = 0.2f},
           .has_head_thresholds = true},
          {{4, 2, 64, {{300, 1000}, {400, 512}}},
           DType::kBF16,
           {.method = Method::kFlashPrefill,
            .coverage_rows = 2,
            .as_published = true,
            .alpha = 0.3f}},
          {{4, 2, 64, {{300, 1000}, {400, 450}}},
           DType::kBF16,
           {.method = Method::kXAttention, .threshold = 0.6f, .coverage_rows = 2}},
          {{2, 1, 64, {{900, 1000}}},
           DType::kBF16,
           {.method = Method::kXAttention,
            .threshold = 0.4f,
            .coverage_rows = 2,
            .permute = true,
            .as_published = true,
            .stride = 16}},
          // Scores of more than a warp's threads.
          {{4, 1, 64, {{130, 4400}}},
           DType::kBF16,
           {.method = Method::kFlashPrefill, .coverage_rows = 1, .alpha = 0.9f}}};
}

}  // namespace
}  // namespace pbs::emulator

int main() {
  for (uint32_t seed : {1u, 2u}) {
    for (const pbs::AttentionProblem& problem : pbs::emulator::Problems()) {
      if (!pbs::emulator::RunsRight<64>(problem, seed)) return 1;
    }
    if (!pbs::emulator::OrdersTilesRight(seed)) return 1;
  }
  return 0;
}
