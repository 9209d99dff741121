// Parity with the authors' own outputs (tests/golden/README.md): every PBS and mean
// pooling case on every table of the CPU backend.
//
//   f32        order and mask identical to theirs; output within 2e-5 of theirs and
//   2e-6
//              of our oracle
//   f16, bf16  mask identical given their order; output within 2e-3 / 4e-2 given their
//              order and mask; with our own order every moved key is a near tie
//
// Where a case must compute order or mask itself, it is not given them: the tensors are
// null, so using them would crash.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "cpu/cpu_attention.h"
#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/support/attention_case.h"
#include "tests/support/safetensors_file.h"

namespace pbs::cpu {
namespace {

using testing_support::BackendRun;
using testing_support::FileTensor;
using testing_support::ReadSafetensors;
using testing_support::RunOn;
using testing_support::TensorMap;

constexpr char kFolder[] = "tests/golden/";

nlohmann::json Manifest() {
  const auto text = ReadTextFile(std::string(kFolder) + "manifest.json", 1 << 20);
  PBS_CHECK(text.ok());
  return nlohmann::json::parse(*text);
}

// One case of the manifest, ready to run.
class GoldenCase {
 public:
  explicit GoldenCase(const nlohmann::json& entry)
      : name(entry["name"]),
        file_(ReadSafetensors(kFolder + entry["file"].get<std::string>())),
        inputs_(entry.contains("inputs_from")
                    ? ReadSafetensors(kFolder +
                                      entry["inputs_from"].get<std::string>() +
                                      ".safetensors")
                    : file_) {
    problem.dtype = *ParseDType(entry["dtype"].get<std::string>());
    problem.options = Options(entry);
    const auto& q = inputs_.at("q").shape;
    const auto len = static_cast<int32_t>(q[2]);
    problem.shape = {
        .num_heads = static_cast<int32_t>(q[1]),
        .num_kv_heads = static_cast<int32_t>(inputs_.at("k").shape[1]),
        .head_dim = static_cast<int32_t>(q[3]),
        .sequences = std::vector<SequenceShape>(static_cast<size_t>(q[0]), {len, len})};
    q_ = inputs_.at("q").As(problem.dtype);
    k_ = inputs_.at("k").As(problem.dtype);
    v_ = inputs_.at("v").As(problem.dtype);
    o_.assign(q_.size(), 0xFF);
    if (file_.contains("order")) order_ = file_.at("order").Integers();
  }

  bool has_mask() const { return file_.contains("block_mask"); }
  bool has_order() const { return !order_.empty(); }
  const std::vector<uint8_t>& mask() const { return file_.at("block_mask").bytes; }
  // Theirs, [batch, heads, len].
  const std::vector<int32_t>& order() const { return order_; }

  AttentionTensors Tensors() {
    const AttentionShape& s = problem.shape;
    const int32_t len = s.sequences[0].k_len;
    const RowLayout rows = DenseBatchLayout(s.num_heads, len, s.head_dim);
    const RowLayout kv_rows = DenseBatchLayout(s.num_kv_heads, len, s.head_dim);
    return {.q = {q_.data(), rows},
            .k = {k_.data(), kv_rows},
            .v = {v_.data(), kv_rows},
            .o = {o_.data(), rows},
            .lse = {},
            .order = {},
            .lists = {}};
  }

  // The same inputs as f32, in which scores are not rounded: for KeyImportance().
  AttentionTensors WideTensors() {
    wide_q_ = inputs_.at("q").As(DType::kF32);
    wide_k_ = inputs_.at("k").As(DType::kF32);
    AttentionTensors tensors = Tensors();
    tensors.q.data = wide_q_.data();
    tensors.k.data = wide_k_.data();
    tensors.v.data = wide_k_.data();  // not read
    return tensors;
  }

  ConstRows GivenOrder() const {
    const AttentionShape& s = problem.shape;
    return {order_.data(), DenseBatchLayout(s.num_heads, s.sequences[0].k_len, 1)};
  }

  // Largest distance of the last output from theirs.
  double DistanceFromGolden() const {
    const std::vector<float> golden = file_.at("o").Floats();
    std::vector<float> ours(golden.size());
    ConvertElements(o_.data(), problem.dtype, ours.data(), DType::kF32,
                    static_cast<int64_t>(ours.size()));
    double worst = 0;
    for (size_t i = 0; i < ours.size(); ++i) {
      EXPECT_FALSE(std::isnan(ours[i])) << name << " element " << i;
      worst = std::max(worst, std::abs(static_cast<double>(ours[i]) - golden[i]));
    }
    return worst;
  }

  // Largest distance of the last output (f32) from the reference's, which is packed.
  double DistanceFrom(const reference::Output& expected) const {
    const AttentionGeometry g = MakeGeometry(problem);
    const auto* ours = reinterpret_cast<const float*>(o_.data());
    const int64_t len = g.sequences[0].q_len;
    double worst = 0;
    for (int64_t batch = 0; batch < static_cast<int64_t>(g.sequences.size()); ++batch) {
      for (int64_t head = 0; head < g.num_heads; ++head) {
        for (int64_t i = 0; i < len * g.head_dim; ++i) {
          const double theirs =
              expected.o[(head * g.total_q + batch * len) * g.head_dim + i];
          const float x = ours[(batch * g.num_heads + head) * len * g.head_dim + i];
          worst = std::max(worst, std::abs(x - theirs));
        }
      }
    }
    return worst;
  }

  const std::string name;
  AttentionProblem problem;

 private:
  static AttentionOptions Options(const nlohmann::json& entry) {
    AttentionOptions options;
    if (entry["method"] == "meanpooling") {
      const auto& params = entry["params"];
      options.method = Method::kMeanPooling;
      options.block_size = params["block_size"];
      options.threshold = params["threshold"];
      options.force_first_block = params["force_select_first_block"];
      return options;
    }
    options.scope = Scope::kQueryHead;
    options.block_size = entry["block"];
    options.segment_size = entry["segment"];
    options.threshold = entry["tau"];
    options.force_first_block = entry["force_first"];
    return options;
  }

  TensorMap file_;
  TensorMap inputs_;
  std::vector<uint8_t> q_, k_, v_, o_, wide_q_, wide_k_;
  std::vector<int32_t> order_;
};

std::vector<GoldenCase> Cases(bool f32) {
  const nlohmann::json manifest = Manifest();
  std::vector<GoldenCase> cases;
  for (const char* list : {"cases", "baselines"}) {
    for (const auto& entry : manifest[list]) {
      if ((entry["dtype"] == "f32") == f32) cases.emplace_back(entry);
    }
  }
  return cases;
}

// The report's packed order [heads, batch * len] as theirs [batch, heads, len].
std::vector<int32_t> AsBatch(const AttentionGeometry& g,
                             const std::vector<int32_t>& packed) {
  std::vector<int32_t> order;
  for (const SequenceGeometry& s : g.sequences) {
    for (int32_t head = 0; head < g.num_order_heads; ++head) {
      const auto begin = packed.begin() + head * g.total_k + s.k_begin;
      order.insert(order.end(), begin, begin + s.k_len);
    }
  }
  return order;
}

struct Moves {
  int64_t keys = 0;
  double gap_ulps = 0;  // largest score gap, in ulps of the input dtype at the score
};

// Compares two orders slot by slot under exact (unrounded) scores.
Moves CompareOrders(GoldenCase& golden, const std::vector<int32_t>& ours) {
  AttentionProblem exact = golden.problem;
  exact.dtype = DType::kF32;
  const AttentionTensors wide = golden.WideTensors();
  const AttentionGeometry g = MakeGeometry(golden.problem);
  const int mantissa = golden.problem.dtype == DType::kF16 ? 10 : 7;
  Moves moves;
  for (int32_t n = 0; n < static_cast<int32_t>(g.sequences.size()); ++n) {
    const SequenceGeometry& s = g.sequences[n];
    for (int32_t head = 0; head < g.num_heads; ++head) {
      const auto score = reference::KeyImportance(exact, wide, n, head);
      const int64_t at = (static_cast<int64_t>(n) * g.num_heads + head) * s.k_len;
      for (size_t slot = 0; slot < score.size(); ++slot) {
        const int32_t mine = ours[at + slot];
        const int32_t theirs = golden.order()[at + slot];
        if (mine == theirs) continue;
        ++moves.keys;
        const double larger = std::max(score[mine], score[theirs]);
        const double ulp = std::exp2(std::floor(std::log2(larger)) - mantissa);
        moves.gap_ulps =
            std::max(moves.gap_ulps, std::abs(score[mine] - score[theirs]) / ulp);
      }
    }
  }
  return moves;
}

// The oracle is slow and the same for every table: its answers are kept by case name.
const reference::Output& OracleOutput(GoldenCase& golden, reference::LogitSum sum) {
  static auto& kept =
      *new std::map<std::pair<std::string, reference::LogitSum>, reference::Output>;
  const auto key = std::pair(golden.name, sum);
  const auto found = kept.find(key);
  if (found != kept.end()) return found->second;
  return kept[key] = reference::Attend(
             golden.problem, golden.Tensors(),
             reference::Decide(golden.problem, golden.Tensors()), sum);
}

class GoldenSpec : public testing::TestWithParam<Isa> {
 protected:
  BackendRun Run(GoldenCase& golden, const AttentionProblem& problem,
                 const AttentionTensors& tensors) {
    const BackendRun run = RunOn(attention_, problem, tensors);
    EXPECT_TRUE(run.status.ok()) << golden.name << ": " << run.status.ToString();
    return run;
  }

  ThreadPool pool_{2};
  CpuAttention attention_{pool_, GetParam(), GetParam() == Isa::kAvx512Bf16};
};

TEST_P(GoldenSpec, F32OrderMaskAndOutputAreTheAuthors) {
  std::vector<GoldenCase> cases = Cases(/*f32=*/true);
  ASSERT_EQ(cases.size(), 8u);
  for (GoldenCase& golden : cases) {
    SCOPED_TRACE(golden.name);
    const BackendRun run = Run(golden, golden.problem, golden.Tensors());
    const AttentionGeometry g = MakeGeometry(golden.problem);
    if (golden.has_order()) {
      EXPECT_EQ(AsBatch(g, run.report.order), golden.order());
    }
    EXPECT_EQ(ExpandMask(g, run.report.lists.View()), golden.mask());
    // Mean-pooling outputs are stored as f16: half an ulp of magnitude 4.
    const bool stored_as_f16 = golden.problem.options.method == Method::kMeanPooling;
    EXPECT_LE(golden.DistanceFromGolden(), stored_as_f16 ? 2e-3 : 2e-5);
    const double from_oracle =
        golden.DistanceFrom(OracleOutput(golden, reference::LogitSum::kF32));
    EXPECT_LE(from_oracle, 2e-6);
    // f64 logits: the rounding of f32 logits of magnitude up to 30 comes on top.
    const double from_f64 =
        golden.DistanceFrom(OracleOutput(golden, reference::LogitSum::kF64));
    EXPECT_LE(from_f64, 2e-5);
    std::printf("%-36s distance from theirs %.1e, f32 oracle %.2e, f64 oracle %.1e\n",
                golden.name.c_str(), golden.DistanceFromGolden(), from_oracle,
                from_f64);
  }
}

TEST_P(GoldenSpec, HalfPrecisionMasksAreTheAuthorsGivenTheirOrder) {
  std::vector<GoldenCase> cases = Cases(/*f32=*/false);
  ASSERT_EQ(cases.size(), 6u);
  for (GoldenCase& golden : cases) {
    if (!golden.has_mask()) continue;  // the case that runs dense
    SCOPED_TRACE(golden.name);
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    if (golden.has_order()) {
      problem.options.use_given_order = true;
      tensors.order = golden.GivenOrder();
    }
    const BackendRun run = Run(golden, problem, tensors);
    EXPECT_EQ(ExpandMask(MakeGeometry(problem), run.report.lists.View()),
              golden.mask());
  }
}

TEST_P(GoldenSpec, HalfPrecisionOutputsAreTheAuthorsGivenTheirOrderAndMask) {
  for (GoldenCase& golden : Cases(/*f32=*/false)) {
    SCOPED_TRACE(golden.name);
    AttentionProblem problem = golden.problem;
    AttentionTensors tensors = golden.Tensors();
    BlockLists lists;
    if (golden.has_mask()) {
      problem.options.use_given_lists = true;
      lists = *ListsFromMask(MakeGeometry(problem), golden.mask());
      tensors.lists = lists.View();
    }
    if (golden.has_order()) {
      problem.options.use_given_order = true;
      tensors.order = golden.GivenOrder();
    }
    Run(golden, problem, tensors);
    const double distance = golden.DistanceFromGolden();
    EXPECT_LE(distance, golden.problem.dtype == DType::kF16 ? 2e-3 : 4e-2);
    std::printf("%-36s given order and mask: %.1e\n", golden.name.c_str(), distance);
  }
}

TEST_P(GoldenSpec, HalfPrecisionOrdersDifferOnlyOnNearTies) {
  for (GoldenCase& golden : Cases(/*f32=*/false)) {
    if (!golden.has_order()) continue;
    SCOPED_TRACE(golden.name);
    const BackendRun run = Run(golden, golden.problem, golden.Tensors());
    const Moves moves =
        CompareOrders(golden, AsBatch(MakeGeometry(golden.problem), run.report.order));
    std::printf("%-36s own order: %ld keys moved, largest score gap %.2f ulp\n",
                golden.name.c_str(), static_cast<long>(moves.keys), moves.gap_ulps);
    EXPECT_LE(moves.gap_ulps, 1.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, GoldenSpec, testing::ValuesIn(SupportedIsas()),
                         [](const auto& table) { return IsaName(table.param); });

}  // namespace
}  // namespace pbs::cpu
