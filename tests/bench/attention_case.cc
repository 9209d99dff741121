// Attention alone, on the structured generator, on white noise, or with forced lists.
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "kernels/synthetic/synthetic.h"
#include "pbs/cpu_backend.h"
#include "tests/bench/bench_case.h"
#include "tests/bench/forced_lists.h"
#include "tests/bench/options.h"

namespace pbs::bench {
namespace {

// As peers count them: 4 * head_dim per causal pair of a query and a key. The blocks on
// the diagonal, which are computed whole, have more.
double CausalPairFlops(const AttentionGeometry& g) {
  double pairs = 0;
  for (const SequenceGeometry& s : g.sequences) {
    pairs += s.q_len * (s.query_offset + (s.q_len + 1) / 2.0);
  }
  return 4.0 * g.head_dim * g.num_heads * pairs;
}

class AttentionBench final : public Case {
 public:
  static CaseOr Create(const Words& words, int threads) {
    auto bench = std::unique_ptr<AttentionBench>(new AttentionBench);
    PBS_RETURN_IF_ERROR(bench->Prepare(words, threads));
    return CaseOr(std::move(bench));
  }

  Status Run() override {
    return backend_->Run(*plan_, tensors_, workspace_.workspace(), {});
  }

  std::string Details() const override {
    AttentionReport report;
    if (!backend_->ReadReport(*plan_, workspace_.workspace(), {}, &report).ok()) {
      return "";
    }
    const AttentionStats& stats = report.stats;
    std::ostringstream out;
    out << ",\"density\":" << stats.CausalRatio()
        << ",\"lower_density\":" << stats.LowerDensity()
        << ",\"permute\":" << stats.permute_seconds
        << ",\"select\":" << stats.select_seconds
        << ",\"attend\":" << stats.attend_seconds
        << ",\"executed_flops\":" << stats.executed_flops
        << ",\"dense_flops\":" << CausalPairFlops(plan_->geometry)
        << ",\"workspace_bytes\":" << plan_->workspace_bytes << ",\"isa\":\""
        << backend_->info().isa << "\"";
    return out.str();
  }

 private:
  Status Prepare(const Words& words, int threads) {
    PBS_ASSIGN_OR_RETURN(
        backend_,
        CreateCpuBackend({.num_threads = threads, .isa = words.Text("isa", "auto")}));
    const int32_t len = words.Integer("len", 4096);
    AttentionProblem problem;
    problem.shape = {.num_heads = words.Integer("heads", 8),
                     .num_kv_heads = words.Integer("kv_heads", 8),
                     .head_dim = words.Integer("head_dim", 128),
                     .sequences = {{len, len}}};
    PBS_ASSIGN_OR_RETURN(problem.dtype, ParseDType(words.Text("dtype", "f32")));
    problem.options = OptionsOf(words);
    const double density = words.Real("density", 0);
    if (density > 0) {
      lists_ = ForcedLists(MakeGeometry(problem), density);
      tensors_.lists = lists_.View();
    }
    PBS_ASSIGN_OR_RETURN(plan_, backend_->Plan(problem));
    PBS_RETURN_IF_ERROR(MakeTensors(problem, words.Text("data", "structured")));
    PBS_ASSIGN_OR_RETURN(workspace_, backend_->Allocate(plan_->workspace_bytes));
    return Run();  // warms up
  }

  Status MakeTensors(const AttentionProblem& problem, const std::string& data) {
    const AttentionShape& s = problem.shape;
    const int64_t len = s.sequences[0].k_len;
    const int64_t row_bytes = s.head_dim * DTypeBytes(problem.dtype);
    PBS_ASSIGN_OR_RETURN(q_, backend_->Allocate(s.num_heads * len * row_bytes));
    PBS_ASSIGN_OR_RETURN(k_, backend_->Allocate(s.num_kv_heads * len * row_bytes));
    PBS_ASSIGN_OR_RETURN(v_, backend_->Allocate(s.num_kv_heads * len * row_bytes));
    PBS_ASSIGN_OR_RETURN(o_, backend_->Allocate(s.num_heads * len * row_bytes));
    const SyntheticShape shape = {s.num_heads, s.num_kv_heads,
                                  static_cast<int32_t>(len), s.head_dim};
    const SyntheticTargets targets = {problem.dtype, q_.data(), k_.data(), v_.data()};
    if (data == "noise") {
      PBS_RETURN_IF_ERROR(GenerateWhiteNoise(shape, 1, 0, targets, nullptr));
    } else {
      PBS_RETURN_IF_ERROR(GenerateStructured(shape, {}, 1, 0, targets, nullptr));
    }
    const RowLayout layout = PackedLayout(len, s.head_dim);
    tensors_.q = {q_.data(), layout};
    tensors_.k = {k_.data(), layout};
    tensors_.v = {v_.data(), layout};
    tensors_.o = {o_.data(), layout};
    return OkStatus();
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<AttentionPlan> plan_;
  Buffer q_, k_, v_, o_, workspace_;
  BlockLists lists_;
  AttentionTensors tensors_;
};

}  // namespace

CaseOr MakeAttentionCase(const Words& words, int threads) {
  return AttentionBench::Create(words, threads);
}

}  // namespace pbs::bench
