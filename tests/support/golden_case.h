// Outputs of the authors' code (tests/golden/README.md), as cases to run and compare.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pbs/attention.h"
#include "pbs/block_mask.h"
#include "pbs/check.h"
#include "reference/reference_attention.h"
#include "tests/support/largest_error.h"
#include "tests/support/safetensors_file.h"

namespace pbs::testing_support {

inline constexpr char kGoldenFolder[] = "tests/golden/";

inline nlohmann::json GoldenManifest() {
  const auto text = ReadTextFile(std::string(kGoldenFolder) + "manifest.json", 1 << 20);
  PBS_CHECK(text.ok());
  return nlohmann::json::parse(*text);
}

// Options of the authors' code as ours.
inline AttentionOptions BaselineOptions(const nlohmann::json& entry) {
  const std::string method = entry["method"];
  const nlohmann::json& params = entry["params"];
  AttentionOptions options;
  options.block_size = params.value("block_size", options.block_size);
  // Made by the authors' code, or by a model that can also leave its deviations out.
  options.as_published = params.value("as_published", true);
  if (method == "meanpooling") {
    options.method = Method::kMeanPooling;
    options.threshold = params["threshold"];
    options.force_first_block = params["force_select_first_block"];
    options.as_published = false;
  } else if (method == "xattention") {
    options.method = Method::kXAttention;
    options.threshold = params["threshold"];
    options.stride = params["stride"];
  } else if (method == "minference") {
    options.method = Method::kMInference;
    options.vertical_tokens = params["vertical_size"];
    options.slash_tokens = params["slash_size"];
  } else if (method == "flexprefill") {
    options.method = Method::kFlexPrefill;
    options.gamma = params["gamma"];
    options.tau = params["tau"];
  } else if (method == "prism") {
    options.method = Method::kPrism;
    options.threshold = params["low_freq_threshold"];
    options.fast_threshold = params["high_freq_threshold"];
    options.slow_dims = params["low_freq_dim"];
    options.fast_dims = params["high_freq_dim"];
    options.force_first_block = params["force_sink"];
  } else if (method == "flashprefill") {
    options.method = Method::kFlashPrefill;
    options.alpha = params["alpha"];
    options.sink_blocks = params["attention_sink"];
    options.window_blocks = params["window_size"];
    options.dense_tail_blocks = params["last_n_block_full"];
  } else {
    PBS_CHECK(method == "mean_correction");  // of the blocks that a given mask leaves
    options.method = Method::kMeanPooling;
    options.mean_correction = true;
    options.as_published = false;
  }
  return options;
}

inline AttentionOptions GoldenOptions(const nlohmann::json& entry) {
  if (entry.contains("params")) return BaselineOptions(entry);
  AttentionOptions options;
  options.scope = Scope::kQueryHead;
  options.block_size = entry["block"];
  options.segment_size = entry["segment"];
  options.threshold = entry["tau"];
  options.force_first_block = entry["force_first"];
  return options;
}

// One case of the manifest, ready to run.
class GoldenCase {
 public:
  explicit GoldenCase(const nlohmann::json& entry)
      : name(entry["name"]),
        file_(ReadSafetensors(kGoldenFolder + entry["file"].get<std::string>())),
        inputs_(entry.contains("inputs_from")
                    ? ReadSafetensors(kGoldenFolder +
                                      entry["inputs_from"].get<std::string>() +
                                      ".safetensors")
                    : file_) {
    problem.dtype = *ParseDType(entry["dtype"].get<std::string>());
    problem.options = GoldenOptions(entry);
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
    if (entry.contains("density")) density_ = MeanOf(entry["density"]);
    if (entry.contains("lower_density"))
      lower_density_ = MeanOf(entry["lower_density"]);
  }

  bool has_output() const { return file_.contains("o"); }
  bool has_mask() const { return file_.contains("block_mask"); }
  bool has_order() const { return !order_.empty(); }
  const std::vector<uint8_t>& mask() const { return file_.at("block_mask").bytes; }
  // Values of the authors' code, means over batch and heads, to six digits; 0: not
  // stated. `density` is a causal ratio.
  double density() const { return density_; }
  double lower_density() const { return lower_density_; }
  // Columns and distances of the authors' code, by head. Requires one sequence.
  std::vector<ChosenLines> Lines() const {
    std::vector<ChosenLines> lines(static_cast<size_t>(problem.shape.num_heads));
    for (const bool of_columns : {true, false}) {
      const std::vector<int32_t> all =
          file_.at(of_columns ? "vertical" : "slash").Integers();
      const size_t per_head = all.size() / lines.size();
      for (size_t head = 0; head < lines.size(); ++head) {
        std::vector<int32_t>& chosen =
            of_columns ? lines[head].columns : lines[head].distances;
        chosen.assign(all.begin() + static_cast<int64_t>(head * per_head),
                      all.begin() + static_cast<int64_t>((head + 1) * per_head));
        std::sort(chosen.begin(), chosen.end());
      }
    }
    return lines;
  }
  // The order of the authors' code, [batch, heads, len].
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

  // Makes `given` and `tensors` use the authors' order, and their mask (as the lists in
  // `lists`), where the case has them.
  void GiveOrder(AttentionProblem& given, AttentionTensors& tensors) const {
    if (!has_order()) return;
    given.options.use_given_order = true;
    tensors.order = GivenOrder();
  }
  void GiveOrderAndMask(AttentionProblem& given, AttentionTensors& tensors,
                        BlockLists& lists) const {
    GiveOrder(given, tensors);
    if (!has_mask()) return;
    given.options.use_given_lists = true;
    given.options.sink_blocks = 0;  // in the mask
    given.options.window_blocks = 0;
    given.options.dense_tail_blocks = 0;
    lists = *ListsFromMask(MakeGeometry(given), mask());
    tensors.lists = lists.View();
  }

  // Calls body(data, bytes, whether it holds values) for each array of Tensors().
  template <class Body>
  void ForEachArray(Body&& body) const {
    for (const auto* array : {&q_, &k_, &v_}) {
      body(array->data(), static_cast<int64_t>(array->size()), true);
    }
    body(o_.data(), static_cast<int64_t>(o_.size()), false);
  }

  // The same inputs as f32, for KeyImportance() without rounding of scores.
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

  // Largest distance of the last output from that of the authors' code.
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
  // The same of a packed output of the reference. Requires one sequence.
  double DistanceFromGolden(const reference::Output& ours) const {
    const std::vector<float> golden = file_.at("o").Floats();
    PBS_CHECK(problem.shape.sequences.size() == 1 && ours.o.size() == golden.size());
    double worst = 0;
    for (size_t i = 0; i < golden.size(); ++i) {
      worst = LargerError(worst, std::abs(ours.o[i] - golden[i]));
    }
    return worst;
  }
  // Half an ulp of the stored output at magnitude 4; 0 when it is f32.
  double StorageError() const {
    const DType stored = file_.at("o").Float();
    return stored == DType::kF32 ? 0 : stored == DType::kF16 ? 0x1p-9 : 0x1p-6;
  }

  // Largest distance of the last output (f32) from the packed output of the reference.
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
          worst = testing_support::LargerError(worst, std::abs(x - theirs));
        }
      }
    }
    return worst;
  }

  const std::string name;
  AttentionProblem problem;

 private:
  static double MeanOf(const nlohmann::json& values) {
    double sum = 0;
    for (const double value : values) sum += value;
    return sum / static_cast<double>(values.size());
  }
  TensorMap file_;
  TensorMap inputs_;
  std::vector<uint8_t> q_, k_, v_, o_, wide_q_, wide_k_;
  std::vector<int32_t> order_;
  double density_ = 0, lower_density_ = 0;
};

// The cases of `lists` in the manifest that `accepts`.
template <class Accepts>
std::vector<GoldenCase> CasesOf(std::initializer_list<const char*> lists,
                                Accepts&& accepts) {
  const nlohmann::json manifest = GoldenManifest();
  std::vector<GoldenCase> cases;
  for (const char* list : lists) {
    for (const auto& entry : manifest[list]) {
      if (accepts(entry)) cases.emplace_back(entry);
    }
  }
  return cases;
}

// PBS and mean pooling, in f32 or in half precision.
inline std::vector<GoldenCase> GoldenCases(bool f32) {
  return CasesOf({"cases", "baselines"}, [f32](const nlohmann::json& entry) {
    const bool is_ours = entry["method"] == "pbs" || entry["method"] == "meanpooling";
    return is_ours && (entry["dtype"] == "f32") == f32;
  });
}

// The other methods that select blocks, of the authors' code and of the NumPy model.
inline std::vector<GoldenCase> BaselineCases() {
  return CasesOf({"baselines", "numpy"}, [](const nlohmann::json& entry) {
    return entry["method"] == "xattention" || entry["method"] == "flexprefill" ||
           entry["method"] == "prism" || entry["method"] == "flashprefill";
  });
}

// The published code of prism rounds block means and temperatures to the input dtype,
// we do not. In the case in bf16 that swaps two blocks of head 0, row 8, whose
// estimated masses are 0.0867 and 0.0858, next to the threshold.
inline int64_t BlocksThatMayDiffer(const GoldenCase& golden) {
  return golden.name == "prism_struct_1100_d64_bf16_t75" ? 1 : 0;
}

inline int64_t BlocksThatDiffer(const std::vector<uint8_t>& a,
                                const std::vector<uint8_t>& b) {
  EXPECT_EQ(a.size(), b.size());
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return count;
}

// The published code of minference rounds logits and probabilities to the input dtype,
// we do not. In the case in bf16 that exchanges 3 of the 1,040 lines: a logit between 4
// and 8 is off by up to 1.6 %, a probability and a sum of them by 0.4 % each.
struct LinesThatMayDiffer {
  int64_t differ = 0;  // both of an exchange
  double apart = 0;
};
inline LinesThatMayDiffer LinesMayDiffer(const GoldenCase& golden) {
  if (golden.problem.dtype == DType::kF32) return {};
  return {.differ = 6, .apart = 0.024};
}

// Columns and distances of the authors' code.
inline std::vector<GoldenCase> LineCases() {
  return CasesOf({"baselines"}, [](const nlohmann::json& entry) {
    return entry["method"] == "minference";
  });
}

inline std::vector<GoldenCase> MeanCorrectionCases() {
  return CasesOf({"baselines"}, [](const nlohmann::json& entry) {
    return entry["method"] == "mean_correction";
  });
}

}  // namespace pbs::testing_support
