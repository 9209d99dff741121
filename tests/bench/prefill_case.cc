// A whole prefill: tokens to the first token, in process.
#include <chrono>
#include <random>
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

class PrefillBench final : public Case, private PrefillObserver {
 public:
  explicit PrefillBench(const Model& model) : model_(model) {}

  Status Prepare(const Words& words) {
    const int32_t len = words.Integer("len", 4096);
    AttentionOptions options = OptionsOf(words);
    options.dense_fallback =
        options.method != Method::kDense && !options.use_given_lists;
    PBS_ASSIGN_OR_RETURN(
        plan_, PlanPrefill(model_, {.num_tokens = len, .attention = options}));
    if (const double density = words.Real("density", 0); density > 0) {
      lists_ = ForcedLists(plan_.attention->geometry, density);
    }
    std::minstd_rand random(7);
    for (int32_t i = 0; i < len; ++i) {
      tokens_.push_back(static_cast<int32_t>(random() % model_.config().vocab_size));
    }
    logits_.resize(static_cast<size_t>(model_.config().vocab_size));
    return OkStatus();
  }

  // Allocates like a request does, so that a run's memory is a request's.
  Status Run() override {
    stages_ = {};
    density_ = 0;
    const auto begin = std::chrono::steady_clock::now();
    PBS_ASSIGN_OR_RETURN(
        KvCache cache,
        KvCache::Create(model_.kv_shape(static_cast<int32_t>(tokens_.size())),
                        model_.backend()));
    PBS_ASSIGN_OR_RETURN(Buffer workspace,
                         model_.backend().Allocate(plan_.workspace_bytes));
    PrefillInputs inputs = {.tokens = tokens_};
    if (!lists_.count.empty()) inputs.lists = lists_.View();
    PBS_ASSIGN_OR_RETURN(auto run, PrefillRun::Start(model_, plan_, inputs, cache,
                                                     workspace.workspace()));
    while (!run->layers_done()) PBS_RETURN_IF_ERROR(run->RunLayer(this, {}));
    PBS_RETURN_IF_ERROR(run->ComputeLogits());
    PBS_RETURN_IF_ERROR(run->ReadLogits(0, logits_));
    first_token_ = Argmax(logits_);
    ttft_ =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    kv_bytes_ = cache.shape().bytes();
    return OkStatus();
  }

  std::string Details() const override {
    std::ostringstream out;
    out << ",\"ttft\":" << ttft_ << ",\"first_token\":" << first_token_
        << ",\"density\":" << density_ / model_.config().num_layers
        << ",\"qkv\":" << stages_.qkv_seconds << ",\"mlp\":" << stages_.mlp_seconds
        << ",\"permute\":" << stages_.attention.permute_seconds
        << ",\"select\":" << stages_.attention.select_seconds
        << ",\"attend\":" << stages_.attention.attend_seconds
        << ",\"planned_bytes\":" << plan_.workspace_bytes + kv_bytes_;
    return out.str();
  }

 private:
  void OnKvReady(int32_t) override {}
  void OnLayerDone(const LayerReport& report) override {
    stages_.qkv_seconds += report.qkv_seconds;
    stages_.mlp_seconds += report.mlp_seconds;
    stages_.attention.permute_seconds += report.attention.permute_seconds;
    stages_.attention.select_seconds += report.attention.select_seconds;
    stages_.attention.attend_seconds += report.attention.attend_seconds;
    density_ += report.attention.CausalRatio();
  }

  const Model& model_;
  PrefillPlan plan_;
  BlockLists lists_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
  LayerReport stages_;
  double density_ = 0;
  double ttft_ = 0;
  int32_t first_token_ = 0;
  int64_t kv_bytes_ = 0;
};

}  // namespace

CaseOr MakePrefillCase(const Words& words, const Model& model) {
  auto bench = std::make_unique<PrefillBench>(model);
  PBS_RETURN_IF_ERROR(bench->Prepare(words));
  if (words.Integer("warmup", 1) != 0) PBS_RETURN_IF_ERROR(bench->Run());
  return CaseOr(std::move(bench));
}

}  // namespace pbs::bench
