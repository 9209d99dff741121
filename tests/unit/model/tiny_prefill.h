// Tiny models and whole prefills on the CPU backend, for the tests in this folder.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pbs/cpu_backend.h"
#include "server/model/prefill.h"
#include "tests/support/largest_error.h"
#include "tests/support/model_folder.h"
#include "tests/support/reference_model.h"

namespace pbs::tiny_prefill {

using testing_support::ReferenceModel;
using testing_support::TempFolder;
using testing_support::TinyModel;
using testing_support::TinyModelSpec;

// |a - b| over max |b|: f32 sums of at most 128 terms, four layers deep.
inline constexpr double kF32Max = 2e-5;
// K, V, queries and attention outputs rounded once (f16 2^-11, bf16 2^-8), two layers.
inline constexpr double kF16CacheMax = 4e-3;
inline constexpr double kBf16CacheMax = 3e-2;
// Every product operand rounded to bf16 as well.
inline constexpr double kBf16ComputeMax = 4e-2;

inline constexpr AttentionOptions kDenseOptions = {.method = Method::kDense};

inline std::unique_ptr<Backend> MakeBackend() {
  auto backend =
      CreateCpuBackend({.num_threads = 2, .compute = ComputePreference::kF32});
  EXPECT_TRUE(backend.ok()) << backend.status().ToString();
  return *std::move(backend);
}

inline std::unique_ptr<Model> LoadTiny(const TinyModel& tiny, Backend& backend,
                                       const ModelOptions& options = {}) {
  const TempFolder folder;
  tiny.Write(folder, 2);
  auto model = Model::Load(folder.path(), options, backend);
  EXPECT_TRUE(model.ok()) << model.status().ToString();
  return *std::move(model);
}

inline std::vector<int32_t> RandomTokens(int32_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 97);
  return tokens;
}

inline std::vector<int32_t> AllRows(int32_t count) {
  std::vector<int32_t> rows(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) rows[i] = i;
  return rows;
}

// Logs the observer's calls, in order.
class EventLog : public PrefillObserver {
 public:
  void OnKvReady(int32_t layer) override {
    events.push_back("kv " + std::to_string(layer));
    if (on_kv_ready) on_kv_ready(layer);
  }
  void OnLayerDone(const LayerReport& report) override {
    events.push_back("done " + std::to_string(report.layer));
    reports.push_back(report);
  }
  std::vector<std::string> events;
  std::vector<LayerReport> reports;
  std::function<void(int32_t)> on_kv_ready;
};

// One prefill from plan to logits, or the first error.
struct Prefilled {
  std::vector<std::vector<float>> logits;
  Status status;
};

inline Prefilled RunPlan(const Model& model, const PrefillPlan& plan,
                         std::span<const int32_t> tokens, KvCache& cache,
                         PrefillObserver* observer = nullptr,
                         const RunControl& control = {}) {
  Prefilled result;
  auto workspace = model.backend().Allocate(plan.workspace_bytes);
  if (!workspace.ok()) return {{}, workspace.status()};
  auto run =
      PrefillRun::Start(model, plan, {.tokens = tokens}, cache, workspace->workspace());
  if (!run.ok()) return {{}, run.status()};
  while (!(*run)->layers_done()) {
    result.status = (*run)->RunLayer(observer, control);
    if (!result.status.ok()) return result;
  }
  result.status = (*run)->ComputeLogits();
  const auto num_rows = static_cast<int32_t>(plan.problem.logit_rows.size());
  for (int32_t i = 0; i < num_rows && result.status.ok(); ++i) {
    std::vector<float> row(static_cast<size_t>(model.config().vocab_size));
    result.status = (*run)->ReadLogits(i, row);
    result.logits.push_back(row);
  }
  return result;
}

inline Prefilled Prefill(const Model& model, const PrefillProblem& problem,
                         std::span<const int32_t> tokens, KvCache& cache,
                         PrefillObserver* observer = nullptr,
                         const RunControl& control = {}) {
  auto plan = PlanPrefill(model, problem);
  if (!plan.ok()) return {{}, plan.status()};
  return RunPlan(model, *plan, tokens, cache, observer, control);
}

inline KvCache MakeCache(const Model& model, int32_t capacity) {
  return *KvCache::Create(model.kv_shape(capacity), model.backend());
}

template <class Rows>
double Difference(const std::vector<std::vector<float>>& actual, const Rows& expected) {
  double worst = 0;
  double largest = 0;
  EXPECT_EQ(actual.size(), expected.size());
  for (size_t r = 0; r < actual.size(); ++r) {
    for (size_t i = 0; i < actual[r].size(); ++i) {
      worst = testing_support::LargerError(
          worst, std::abs(double{actual[r][i]} - double{expected[r][i]}));
      largest = std::max(largest, std::abs(double{expected[r][i]}));
    }
  }
  return worst / largest;
}

// A fixture with one loaded model.
class PrefillRunSpec : public testing::Test {
 protected:
  PrefillRunSpec()
      : backend_(MakeBackend()),
        tiny_({.layers = 3}),
        model_(LoadTiny(tiny_, *backend_)) {}

  std::unique_ptr<Backend> backend_;
  TinyModel tiny_;
  std::unique_ptr<Model> model_;
};

}  // namespace pbs::tiny_prefill
