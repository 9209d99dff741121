// The kernels before attention in this build (mutant_check.h): whole runs whose lists
// must be the reference's, whose outputs the exact answer over them; orders of tiles.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_run.h"
#include "tests/emulator/tile_order_case.h"

namespace pbs::emulator {
namespace {

bool Says(const std::string& what) {
  std::printf("%s\n", what.c_str());
  return false;
}

template <int kHeadDim>
bool RunsRight(const AttentionProblem& problem, uint32_t seed) {
  const auto plan = cuda::MakeCudaPlan(problem, {.num_multiprocessors = 1});
  if (!plan.ok()) return Says(plan.status().ToString());
  PipelineInputs inputs(problem, seed);
  inputs.MakeBlocksDiffer(problem, seed);
  GlobalMemory::Clear();
  inputs.Allow();
  const AttentionTensors tensors = inputs.Tensors();
  const PipelineRun<cuda::Bf16Element, kHeadDim> run(**plan, tensors, seed);
  if (!run.fault().ok()) return Says(run.fault().ToString());
  AttentionReport report;
  const Status status = run.Report({.order = true, .lists = true}, &report);
  if (!status.ok()) return Says(status.ToString());
  reference::Decision decision = reference::Decide(problem, tensors);
  size_t moved = 0;  // a near tie of f32 and f64 may change places
  for (size_t slot = 0; slot < report.order.size(); ++slot) {
    moved += report.order[slot] == decision.order[slot] ? 0 : 1;
  }
  if (moved * 100 > report.order.size()) return Says("another order");
  decision.order = report.order;
  if (report.lines != decision.lines) return Says("other columns or distances");
  const AttentionGeometry& g = (*plan)->geometry;
  if (ExpandMask(g, report.lists.View()) != ExpandMask(g, decision.lists.View())) {
    return Says("other lists");
  }
  if (problem.options.coverage_min > 0) {
    const std::set<int32_t> guarded(report.heads.guarded.begin(),
                                    report.heads.guarded.end());
    if (guarded != decision.guarded_heads) return Says("other heads are guarded");
    const auto heads = static_cast<size_t>(g.num_heads);
    if (guarded.empty() || guarded.size() == heads)
      return Says("a guard of all or none");
  }
  const double coverage = reference::Coverage(problem, tensors, decision);
  const double missed = std::abs(report.stats.coverage - coverage);
  if (!(missed <= 2e-5)) return Says("coverage is wrong by " + std::to_string(missed));
  const reference::Output exact = reference::Attend(problem, tensors, decision);
  for (size_t i = 0; i < exact.o.size(); ++i) {
    const double error = std::abs(ToFloat(bf16{inputs.o.data()[i]}) - exact.o[i]);
    if (!(error <= 3e-2)) return Says("o is wrong by " + std::to_string(error));
  }
  for (size_t i = 0; i < exact.lse.size(); ++i) {
    const double error = std::abs(inputs.lse.data()[i] - exact.lse[i]);
    if (!(error <= 1e-2)) return Says("lse is wrong by " + std::to_string(error));
  }
  return true;
}

bool OrdersTilesRight(uint32_t seed) {
  for (const TileOrderSetting& setting : TileOrderSettings()) {
    TileOrderCase tiles(setting.problem, setting.density, seed, setting.wide_tiles);
    const std::string wrong = tiles.Run(seed);
    if (!wrong.empty()) return Says(setting.name + (": " + wrong));
  }
  return true;
}

// Lists of parts of blocks, and gathered columns: of two blocks, then with blocks that
// are read whole, then of sorted keys.
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
            .slash_tokens = 110}}};
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

std::vector<AttentionProblem> ProblemsOfMoreKernels() {
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
  for (uint32_t seed : {1u, 2u}) {
    for (const auto& problems :
         {pbs::emulator::Problems(), pbs::emulator::ProblemsOfMoreKernels(),
          pbs::emulator::FlexPrefillProblems()}) {
      for (const pbs::AttentionProblem& problem : problems) {
        if (!pbs::emulator::RunsRight<64>(problem, seed)) return 1;
      }
    }
    for (const pbs::AttentionProblem& problem : pbs::emulator::LineProblems()) {
      if (!pbs::emulator::RunsRight<64>(problem, seed)) return 1;
    }
    // Keys of wide heads have one buffer.
    if (!pbs::emulator::RunsRight<256>({{1, 1, 256, {{20, 520}}},
                                        pbs::DType::kBF16,
                                        {.threshold = 0.6f, .coverage_rows = 2}},
                                       seed)) {
      return 1;
    }
    if (!pbs::emulator::RunsRight<256>(
            {{1, 1, 256, {{130, 600}}},
             pbs::DType::kBF16,
             {.method = pbs::Method::kFlashPrefill, .coverage_rows = 2, .alpha = 0.3f}},
            seed)) {
      return 1;
    }
    if (!pbs::emulator::RunsRight<256>({{1, 1, 256, {{130, 600}}},
                                        pbs::DType::kBF16,
                                        {.method = pbs::Method::kMeanPooling,
                                         .threshold = 0.1f,
                                         .force_first_block = false,
                                         .mean_correction = true}},
                                       seed)) {
      return 1;
    }
    if (!pbs::emulator::OrdersTilesRight(seed)) return 1;
  }
  return 0;
}
