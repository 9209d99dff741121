// Retrieval accuracy of the loaded model on recall prompts (tests/quality).
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>
#include <vector>

#include "pbs/backend.h"
#include "server/model/model.h"
#include "server/model/prefill.h"
#include "server/model/sampling.h"
#include "tests/bench/bench_case.h"
#include "tests/bench/forced_lists.h"
#include "tests/bench/options.h"

namespace pbs::bench {
namespace {

struct Prompt {
  std::vector<int32_t> tokens;
  std::vector<int32_t> asked;
  std::vector<int32_t> answers;
};

StatusOr<std::vector<Prompt>> ReadPrompts(const std::string& path) {
  std::ifstream in(path);
  const nlohmann::json file = nlohmann::json::parse(in, nullptr, false);
  if (!file.is_array()) return InvalidArgument(path + " is no list of prompts");
  std::vector<Prompt> prompts;
  for (const nlohmann::json& entry : file) {
    prompts.push_back({entry["tokens"], entry["asked"], entry["answers"]});
  }
  return prompts;
}

// `order=identity` switches permutation off; `density=D` replaces the selected blocks
// by random ones of that density.
class RecallBench final : public Case, private PrefillObserver {
 public:
  explicit RecallBench(const Model& model) : model_(model) {}

  Status Prepare(const Words& words) {
    options_ = OptionsOf(words);
    options_.dense_fallback = false;
    options_.use_given_order = words.Text("order", "") == "identity";
    forced_density_ = words.Real("density", 0);
    PBS_ASSIGN_OR_RETURN(prompts_, ReadPrompts(words.Text("prompts", "")));
    return OkStatus();
  }

  Status Run() override {
    right_ = asked_ = layers_ = 0;
    density_ = 0;
    for (const Prompt& prompt : prompts_) PBS_RETURN_IF_ERROR(Ask(prompt));
    return OkStatus();
  }

  std::string Details() const override {
    std::ostringstream out;
    out << ",\"accuracy\":" << static_cast<double>(right_) / static_cast<double>(asked_)
        << ",\"questions\":" << asked_
        << ",\"density\":" << density_ / static_cast<double>(layers_);
    return out.str();
  }

 private:
  void OnKvReady(int32_t) override {}
  void OnLayerDone(const LayerReport& report) override {
    density_ += report.attention.CausalRatio();
    ++layers_;
  }

  Status Ask(const Prompt& prompt) {
    const auto len = static_cast<int32_t>(prompt.tokens.size());
    PBS_ASSIGN_OR_RETURN(const PrefillPlan plan,
                         PlanPrefill(model_, {.num_tokens = len,
                                              .attention = options_,
                                              .logit_rows = prompt.asked}));
    PrefillInputs inputs = {.tokens = prompt.tokens};
    std::vector<int32_t> identity;
    if (options_.use_given_order) {
      const AttentionGeometry& g = plan.attention->geometry;
      for (int32_t head = 0; head < g.num_order_heads; ++head) {
        identity.resize(identity.size() + static_cast<size_t>(len));
        std::iota(identity.end() - len, identity.end(), 0);
      }
      inputs.order = {identity.data(), PackedLayout(len, 1)};
    }
    BlockLists lists;
    if (options_.use_given_lists) {
      lists = ForcedLists(plan.attention->geometry, forced_density_);
      inputs.lists = lists.View();
    }
    Backend& backend = model_.backend();
    PBS_ASSIGN_OR_RETURN(KvCache cache, KvCache::Create(model_.kv_shape(len), backend));
    PBS_ASSIGN_OR_RETURN(Buffer workspace, backend.Allocate(plan.workspace_bytes));
    PBS_ASSIGN_OR_RETURN(auto run, PrefillRun::Start(model_, plan, inputs, cache,
                                                     workspace.workspace()));
    while (!run->layers_done()) PBS_RETURN_IF_ERROR(run->RunLayer(this, {}));
    PBS_RETURN_IF_ERROR(run->ComputeLogits());
    std::vector<float> logits(static_cast<size_t>(model_.config().vocab_size));
    for (size_t i = 0; i < prompt.asked.size(); ++i) {
      PBS_RETURN_IF_ERROR(run->ReadLogits(static_cast<int32_t>(i), logits));
      right_ += Argmax(logits) == prompt.answers[i];
      ++asked_;
    }
    return OkStatus();
  }

  const Model& model_;
  AttentionOptions options_;
  double forced_density_ = 0;
  std::vector<Prompt> prompts_;
  int64_t right_ = 0, asked_ = 0, layers_ = 0;
  double density_ = 0;
};

}  // namespace

CaseOr MakeRecallCase(const Words& words, const Model& model) {
  auto bench = std::make_unique<RecallBench>(model);
  PBS_RETURN_IF_ERROR(bench->Prepare(words));
  return CaseOr(std::move(bench));
}

}  // namespace pbs::bench
