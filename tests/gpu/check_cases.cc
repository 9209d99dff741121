#include <cstring>
#include <random>
#include <string_view>
#include <utility>

#include "cuda/plan/cuda_plan.h"
#include "pbs/dtype.h"
#include "tests/gpu/check.h"
#include "tests/support/attention_case.h"
#include "tests/support/cuda_matrix.h"

namespace pbs::gpu {
namespace {

std::string NameOf(const AttentionProblem& problem) {
  std::string name = MethodName(problem.options.method);
  name += problem.options.permute ? "_permuted" : "";
  name += problem.options.mean_correction ? "_corrected" : "";
  name += problem.options.coverage_min > 0 ? "_guarded" : "";
  name += problem.options.as_published ? "_published" : "";
  name += problem.options.scope == Scope::kQueryHead ? "_query_head" : "";
  name += problem.has_head_thresholds ? "_head_thresholds" : "";
  name += problem.dtype == DType::kBF16 ? "_bf16_d" : "_f16_d";
  name += std::to_string(problem.shape.head_dim);
  name.append("_h").append(std::to_string(problem.shape.num_heads));
  name.append("x").append(std::to_string(problem.shape.num_kv_heads));
  for (const SequenceShape& s : problem.shape.sequences) {
    name.append("_").append(std::to_string(s.q_len));
    name.append("of").append(std::to_string(s.k_len));
  }
  return name;
}

bool HasOption(Method method, std::string_view name) {
  return (TraitsOf(method).options & FindOption(name)->bit) != 0;
}

// Options that leave blocks out.
AttentionOptions SparseOptions(Method method, float share) {
  AttentionOptions options = DefaultOptions(method);
  if (HasOption(method, "threshold")) options.threshold = share;
  // Scores of normal values lie close together.
  if (HasOption(method, "alpha")) options.alpha = 1 - 0.03f * share;
  if (HasOption(method, "gamma")) options.gamma = share;
  if (HasOption(method, "slash_tokens")) {
    options.vertical_tokens = static_cast<int32_t>(300 * share);
    options.slash_tokens = static_cast<int32_t>(150 * share);
  }
  return options;
}

void AddRowsOfTheMatrix(int32_t head_dim, uint32_t seed, std::vector<Case>& cases) {
  const auto add = [&](const std::string& row, const AttentionProblem& problem) {
    cases.push_back({"row_" + row + "_as_" + NameOf(problem), problem, seed});
    cases.back().structured = true;
  };
  AttentionProblem problem = {{4, 2, head_dim, {{300, 1150}, {200, 700}}}, {}, {}};
  for (const auto& [row, options] : testing_support::MatrixMethodsOfCuda()) {
    problem.dtype = cases.size() % 2 == 0 ? DType::kBF16 : DType::kF16;
    problem.options = options;
    add(row, problem);
  }
  problem.options = SparseOptions(Method::kPbs, 0.6f);
  problem.has_head_thresholds = true;
  add("pbs", problem);
}

}  // namespace

std::vector<Case> TableCases(uint32_t seed) {
  std::vector<Case> cases;
  const auto add = [&](const AttentionProblem& problem) {
    cases.push_back({NameOf(problem), problem, seed});
  };
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      for (const Method method : kMethods) {
        add({{4, 2, head_dim, {{900, 900}, {130, 700}, {1, 1}}},
             dtype,
             SparseOptions(method, 0.6f)});
      }
      const AttentionProblem neighbours = {
          {4, 2, head_dim, {{300, 300}, {200, 200}, {130, 450}}},
          dtype,
          {.method = Method::kDense}};
      cases.push_back({"poisoned_" + NameOf(neighbours), neighbours, seed, 1});
    }
    AddRowsOfTheMatrix(head_dim, seed, cases);
  }
  // More tiles than a GPU has multiprocessors: 192.
  for (const Method method : {Method::kDense, Method::kPbs}) {
    add({{24, 8, 128, {{900, 900}}}, DType::kBF16, {.method = method}});
  }
  add({{8, 1, 128, {{1300, 1300}}}, DType::kBF16, {.threshold = 1}});
  add({{2, 2, 128, {{1300, 1300}}},
       DType::kBF16,
       {.segment_size = 512, .threshold = 0.4f}});
  add({{2, 1, 64, {{1000, 1000}}},
       DType::kBF16,
       {.threshold = 1, .dense_fallback = true}});
  return cases;
}

Case RandomCase(uint32_t seed) {
  std::mt19937 random(seed);
  const auto pick = [&](auto... choices) {
    const std::vector values{choices...};
    return values[random() % values.size()];
  };
  AttentionProblem problem;
  problem.dtype = pick(DType::kBF16, DType::kF16);
  problem.shape.num_kv_heads = pick(1, 2, 3);
  problem.shape.num_heads = problem.shape.num_kv_heads * pick(1, 2, 4);
  problem.shape.head_dim = pick(64, 96, 128, 256);
  const Method method = kMethods[random() % kMethods.size()];
  AttentionOptions& options = problem.options;
  options = SparseOptions(method, pick(0.2f, 0.7f, 0.95f, 1.0f));
  if (HasOption(method, "permute")) options.permute = pick(true, false);
  if (HasOption(method, "stride")) options.stride = pick(2, 8, 16, 64);
  if (HasOption(method, "tau")) options.tau = pick(0.0f, 0.1f, 1.0f);
  if (Permutes(options)) {
    options.scope = pick(Scope::kKvHead, Scope::kQueryHead);
    options.segment_size = pick(128, 256, 384, 1024);
  }
  if (HasOption(method, "force_first_block")) {
    options.force_first_block = pick(true, false);
  }
  if (HasOption(method, "sink_blocks")) {
    options.sink_blocks = pick(0, 0, 1);
    options.window_blocks = pick(0, 0, 3);
    options.dense_tail_blocks = pick(0, 0, 2);
    options.mean_correction = pick(true, false, false);
  }
  const int sequences = pick(1, 2, 5);
  for (int i = 0; i < sequences; ++i) {
    const auto k_len = static_cast<int32_t>(1 + random() % 800);
    const auto q_len =
        pick(true, false) ? k_len : static_cast<int32_t>(1 + random() % k_len);
    problem.shape.sequences.push_back({q_len, k_len});
  }
  return {"random_" + NameOf(problem), problem, seed};
}

Inputs::Inputs(const Case& c)
    : dtype(c.problem.dtype), geometry(MakeGeometry(c.problem)) {
  if (c.structured) {
    testing_support::AttentionCase values(c.problem, c.seed);
    const auto copy = [](const std::vector<uint8_t>& bytes) {
      std::vector<uint16_t> copied(bytes.size() / 2);
      std::memcpy(copied.data(), bytes.data(), bytes.size());
      return copied;
    };
    q = copy(values.q_bytes());
    k = copy(values.k_bytes());
    v = copy(values.v_bytes());
    const auto thresholds = values.Tensors().head_thresholds;
    head_thresholds.assign(thresholds.begin(), thresholds.end());
    return;
  }
  std::mt19937 random(c.seed);
  std::normal_distribution<float> normal;
  const auto fill = [&](std::vector<uint16_t>& values, int64_t rows) {
    values.resize(static_cast<size_t>(rows * geometry.head_dim));
    for (uint16_t& value : values) {
      const float x = 1.5f * normal(random);
      value = dtype == DType::kBF16 ? ToBf16(x).bits : ToF16(x).bits;
    }
  };
  fill(q, geometry.num_heads * geometry.total_q);
  fill(k, geometry.num_kv_heads * geometry.total_k);
  fill(v, geometry.num_kv_heads * geometry.total_k);
}

Inputs Inputs::Poisoned(int32_t sequence) const {
  Inputs poisoned = *this;
  if (sequence < 0) return poisoned;
  const SequenceGeometry& s = geometry.sequences[static_cast<size_t>(sequence)];
  const uint16_t infinity = dtype == DType::kBF16 ? 0x7F80 : 0x7C00;
  const auto spoil = [&](std::vector<uint16_t>& values, int32_t heads, int64_t total,
                         int64_t begin, int64_t rows) {
    for (int32_t head = 0; head < heads; ++head) {
      const int64_t first = (head * total + begin) * geometry.head_dim;
      for (int64_t i = 0; i < rows * geometry.head_dim; ++i) {
        // Rows of NaN, of infinity and of both in turn.
        const int64_t kind = (i / geometry.head_dim + i % 2) % 3;
        values[static_cast<size_t>(first + i)] = kind == 0 ? infinity : 0x7FFF;
      }
    }
  };
  spoil(poisoned.q, geometry.num_heads, geometry.total_q, s.q_begin, s.q_len);
  spoil(poisoned.k, geometry.num_kv_heads, geometry.total_k, s.k_begin, s.k_len);
  spoil(poisoned.v, geometry.num_kv_heads, geometry.total_k, s.k_begin, s.k_len);
  return poisoned;
}

}  // namespace pbs::gpu
