// Whole runs of kernels in a build that may have a planted defect (mutant_check.h): the
// lists must be the reference's, the outputs the exact answer over them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>

#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/emulator/pipeline_run.h"

namespace pbs::emulator {

inline bool Says(const std::string& what) {
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

}  // namespace pbs::emulator
