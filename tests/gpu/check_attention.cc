// Compares the CUDA backend's attention with kernels/reference on a real device: a
// table of methods, dtypes and shapes, then random problems.
//
//   check_attention [--random N] [--seed S] [--variant NAME] [--only SUBSTRING ...]
//                   [--skip N] [--case-seconds N]
//
// --variant: other kernels than the chosen ones (attention_variants.h). --only: cases
// whose name has one of the substrings. --skip: not the first N of them.
// --case-seconds: a case that takes longer ends the program (SIGALRM).
//
// Two JSON lines per problem. Its name before it runs: a fault or a hang is of the last
// one. Then errors of o and lse against the exact answer over the same order and lists,
// rows whose lists differ from the reference's (a near tie may), and whether a second
// run and a replay of a captured graph gave the same bits. Exit status 1 when any is
// out of bounds, 2 when the device is not there or its context is lost.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/backend/attention_variants.h"
#include "pbs/block_mask.h"
#include "reference/reference_attention.h"
#include "tests/gpu/device_memory.h"

namespace pbs::gpu {
namespace {

constexpr double kBf16ErrorMax = 3e-2;
constexpr double kF16ErrorMax = 4e-3;
constexpr double kLseErrorMax = 2e-4;
// Rows of the lists that may differ by a near tie of block masses, in f32.
constexpr double kOtherRowsMax = 0.01;

struct Inputs {
  Inputs(const AttentionProblem& problem, uint32_t seed)
      : geometry(MakeGeometry(problem)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<uint16_t>& values, int64_t rows) {
      values.resize(static_cast<size_t>(rows * geometry.head_dim));
      for (uint16_t& value : values) {
        const float x = 1.5f * normal(random);
        value = problem.dtype == DType::kBF16 ? ToBf16(x).bits : ToF16(x).bits;
      }
    };
    fill(q, geometry.num_heads * geometry.total_q);
    fill(k, geometry.num_kv_heads * geometry.total_k);
    fill(v, geometry.num_kv_heads * geometry.total_k);
  }

  AttentionTensors Tensors(const void* q_data, const void* k_data, const void* v_data,
                           void* o, void* lse) const {
    const int64_t dim = geometry.head_dim;
    AttentionTensors tensors;
    tensors.q = {q_data, PackedLayout(geometry.total_q, dim)};
    tensors.k = {k_data, PackedLayout(geometry.total_k, dim)};
    tensors.v = {v_data, PackedLayout(geometry.total_k, dim)};
    tensors.o = {o, PackedLayout(geometry.total_q, dim)};
    tensors.lse = {lse, PackedLayout(geometry.total_q, 1)};
    return tensors;
  }

  AttentionGeometry geometry;
  std::vector<uint16_t> q, k, v;
};

struct Outputs {
  std::vector<uint16_t> o;
  std::vector<float> lse;
  bool equal_bits = true;  // of all runs
  AttentionReport report;
};

struct Verdict {
  double o_error = 0;
  double lse_error = 0;
  int64_t rows = 0;
  int64_t other_rows = 0;
  bool equal_bits = true;
  double density = 0;
};

// Rows of lists that are not the same.
int64_t OtherRows(const BlockLists& a, const BlockLists& b) {
  int64_t other = 0;
  for (size_t row = 0; row < a.count.size(); ++row) {
    const auto ours = a.View().Row(static_cast<int64_t>(row));
    const auto theirs = b.View().Row(static_cast<int64_t>(row));
    other += std::equal(ours.begin(), ours.end(), theirs.begin(), theirs.end()) ? 0 : 1;
  }
  return other;
}

// What problems run on. The default stream could not be captured.
struct Device {
  // Ends the program, with the reason, where there is no device.
  explicit Device(cuda::AttentionVariant variant) {
    if (const auto answer = cuda::CreateAttentionVariant({}, variant); !answer.ok()) {
      std::fprintf(stderr, "%s\n", answer.status().ToString().c_str());
      std::exit(2);
    }
    Check(cudaStreamCreate(&stream), "cudaStreamCreate");
    backend = *cuda::CreateAttentionVariant({.stream = stream}, variant);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() {
    backend.reset();  // before the stream that it uses
    cudaStreamDestroy(stream);
  }

  cudaStream_t stream = nullptr;
  std::unique_ptr<AttentionBackend> backend;
};

// Captures a run into a graph and launches that.
Status RunCaptured(Device& device, const AttentionPlan& plan,
                   const AttentionTensors& tensors, Workspace workspace) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeGlobal), "capture");
  const Status status = device.backend->Run(plan, tensors, workspace, {});
  const cudaError_t ended = cudaStreamEndCapture(device.stream, &graph);
  if (!status.ok()) return status;
  Check(ended, "end of the capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  Check(cudaGraphLaunch(executable, device.stream), "cudaGraphLaunch");
  Check(cudaStreamSynchronize(device.stream), "graph");
  Check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  Check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  return Status();
}

// On the device, over a poisoned workspace and poisoned outputs: twice as it is, then
// as a graph.
StatusOr<Outputs> RunAll(Device& device, const AttentionPlan& plan,
                         const Inputs& inputs) {
  AttentionBackend& backend = *device.backend;
  const AttentionGeometry& g = plan.geometry;
  const DeviceVector<uint16_t> q(inputs.q), k(inputs.k), v(inputs.v);
  const DeviceVector<uint16_t> o(static_cast<int64_t>(inputs.q.size()));
  const DeviceVector<float> lse(g.num_heads * g.total_q);
  const DeviceBytes workspace(plan.workspace_bytes);
  const auto poison = [&](const DeviceBytes& bytes) {
    Check(cudaMemsetAsync(bytes.data(), 0xFF, static_cast<size_t>(bytes.bytes()),
                          device.stream),
          "memset");
  };
  poison(workspace);
  const AttentionTensors tensors =
      inputs.Tensors(q.data(), k.data(), v.data(), o.data(), lse.data());
  const Workspace lent{workspace.data(), workspace.bytes()};
  Outputs outputs;
  for (int run = 0; run < 3; ++run) {
    poison(o);
    poison(lse);
    Status status = run < 2 ? backend.Run(plan, tensors, lent, {})
                            : RunCaptured(device, plan, tensors, lent);
    if (!status.ok()) return status;
    status =
        backend.ReadReport(plan, lent, {.order = true, .lists = true}, &outputs.report);
    if (!status.ok()) return status;
    const std::vector<uint16_t> now = o.Download();
    outputs.equal_bits = outputs.equal_bits && (run == 0 || now == outputs.o);
    outputs.o = now;
  }
  outputs.lse = lse.Download();
  return outputs;
}

// With the exact answer over the order and the lists that ran.
Verdict Compare(const AttentionProblem& problem, const Inputs& inputs,
                const Outputs& outputs) {
  const AttentionTensors tensors = inputs.Tensors(inputs.q.data(), inputs.k.data(),
                                                  inputs.v.data(), nullptr, nullptr);
  reference::Decision decision;
  decision.order = outputs.report.order;
  decision.lists = outputs.report.lists;
  const reference::Output exact = reference::Attend(problem, tensors, decision);
  const auto grow = [](double& largest, double error) {  // NaN: for good
    largest = std::isnan(error) ? std::numeric_limits<double>::infinity()
                                : std::max(largest, error);
  };
  Verdict verdict;
  for (size_t i = 0; i < outputs.o.size(); ++i) {
    const uint16_t bits = outputs.o[i];
    const float value =
        problem.dtype == DType::kBF16 ? ToFloat(bf16{bits}) : ToFloat(f16{bits});
    grow(verdict.o_error, std::abs(value - exact.o[i]));
  }
  for (size_t i = 0; i < outputs.lse.size(); ++i) {
    grow(verdict.lse_error, std::abs(outputs.lse[i] - exact.lse[i]));
  }
  verdict.rows = static_cast<int64_t>(decision.lists.count.size());
  if (!problem.options.dense_fallback) {
    verdict.other_rows =
        OtherRows(decision.lists, reference::Decide(problem, tensors).lists);
  }
  verdict.equal_bits = outputs.equal_bits;
  verdict.density = outputs.report.stats.Density();
  return verdict;
}

StatusOr<Verdict> Judge(Device& device, const AttentionProblem& problem,
                        uint32_t seed) {
  const auto plan = device.backend->Plan(problem);
  if (!plan.ok()) return plan.status();
  const Inputs inputs(problem, seed);
  const auto outputs = RunAll(device, **plan, inputs);
  if (!outputs.ok()) return outputs.status();
  return Compare(problem, inputs, *outputs);
}

bool IsRight(const AttentionProblem& problem, const Verdict& verdict) {
  const double o_max = problem.dtype == DType::kBF16 ? kBf16ErrorMax : kF16ErrorMax;
  return verdict.o_error <= o_max && verdict.lse_error <= kLseErrorMax &&
         verdict.equal_bits &&
         static_cast<double>(verdict.other_rows) <=
             kOtherRowsMax * static_cast<double>(verdict.rows);
}

std::string JsonNumber(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof(text), "%.3g", value);
  return text;
}

std::string JsonText(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

bool Report(Device& device, const std::string& name, const AttentionProblem& problem,
            uint32_t seed) {
  std::printf("{\"begin\": %s, \"seed\": %u}\n", JsonText(name).c_str(), seed);
  std::fflush(stdout);
  const auto verdict = Judge(device, problem, seed);
  if (!verdict.ok()) {
    std::printf("{\"case\": %s, \"seed\": %u, \"error\": %s}\n", JsonText(name).c_str(),
                seed, JsonText(verdict.status().ToString()).c_str());
    std::fflush(stdout);
    // A fault leaves nothing that the next case could run on.
    Check(cudaDeviceSynchronize(), "the context after this case");
    return false;
  }
  const bool right = IsRight(problem, *verdict);
  std::printf(
      "{\"case\": %s, \"seed\": %u, \"right\": %s, \"o_error\": %s, "
      "\"lse_error\": %s, \"other_rows\": %lld, \"rows\": %lld, \"equal_bits\": %s, "
      "\"density\": %s}\n",
      JsonText(name).c_str(), seed, right ? "true" : "false",
      JsonNumber(verdict->o_error).c_str(), JsonNumber(verdict->lse_error).c_str(),
      static_cast<long long>(verdict->other_rows),
      static_cast<long long>(verdict->rows), verdict->equal_bits ? "true" : "false",
      JsonNumber(verdict->density).c_str());
  std::fflush(stdout);
  return right;
}

std::string NameOf(const AttentionProblem& problem) {
  std::string name = MethodName(problem.options.method);
  name += problem.options.scope == Scope::kQueryHead ? "_query_head" : "";
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

std::vector<AttentionProblem> Table() {
  std::vector<AttentionProblem> problems;
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      for (const Method method : {Method::kDense, Method::kPbs, Method::kMeanPooling}) {
        for (const Scope scope : {Scope::kKvHead, Scope::kQueryHead}) {
          if (scope == Scope::kQueryHead && method != Method::kPbs) continue;
          problems.push_back({{4, 2, head_dim, {{900, 900}, {130, 700}, {1, 1}}},
                              dtype,
                              {.method = method, .threshold = 0.6f, .scope = scope}});
        }
      }
    }
  }
  problems.push_back({{8, 1, 128, {{1300, 1300}}}, DType::kBF16, {.threshold = 1}});
  problems.push_back({{2, 2, 128, {{1300, 1300}}},
                      DType::kBF16,
                      {.segment_size = 512, .threshold = 0.4f}});
  problems.push_back({{2, 1, 64, {{1000, 1000}}},
                      DType::kBF16,
                      {.threshold = 1, .dense_fallback = true}});
  return problems;
}

AttentionProblem RandomProblem(std::mt19937& random) {
  const auto pick = [&](auto... choices) {
    const std::vector values{choices...};
    return values[random() % values.size()];
  };
  AttentionProblem problem;
  problem.dtype = pick(DType::kBF16, DType::kF16);
  problem.shape.num_kv_heads = pick(1, 2, 3);
  problem.shape.num_heads = problem.shape.num_kv_heads * pick(1, 2, 4);
  problem.shape.head_dim = pick(64, 96, 128, 256);
  problem.options.method =
      pick(Method::kDense, Method::kPbs, Method::kPbs, Method::kMeanPooling);
  problem.options.scope = pick(Scope::kKvHead, Scope::kQueryHead);
  problem.options.segment_size = pick(128, 256, 384, 1024);
  problem.options.threshold = pick(0.2f, 0.7f, 0.95f, 1.0f);
  problem.options.force_first_block = pick(true, false);
  const int sequences = pick(1, 2, 5);
  for (int i = 0; i < sequences; ++i) {
    const auto k_len = static_cast<int32_t>(1 + random() % 800);
    const auto q_len =
        pick(true, false) ? k_len : static_cast<int32_t>(1 + random() % k_len);
    problem.shape.sequences.push_back({q_len, k_len});
  }
  return problem;
}

struct Case {
  std::string name;
  AttentionProblem problem;
  uint32_t seed;
};

struct Options {
  int random_problems = 40;
  uint32_t seed = 1;
  std::vector<std::string> only;
  int skip = 0;
  unsigned case_seconds = 0;  // 0: no limit
  cuda::AttentionVariant variant = cuda::AttentionVariant::kChosen;
};

// False, after saying why, when an argument is not known.
bool ParseOptions(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--variant" && i + 1 < argc) {
      const auto& names = cuda::kAttentionVariantNames;
      const auto found = std::find(names.begin(), names.end(), std::string(argv[++i]));
      if (found == names.end()) {
        std::fprintf(stderr, "there is no variant %s\n", argv[i]);
        return false;
      }
      options.variant = static_cast<cuda::AttentionVariant>(found - names.begin());
    } else if (argument == "--only" && i + 1 < argc) {
      options.only.emplace_back(argv[++i]);
    } else if (argument == "--skip" && i + 1 < argc) {
      options.skip = std::atoi(argv[++i]);
    } else if (argument == "--case-seconds" && i + 1 < argc) {
      options.case_seconds = static_cast<unsigned>(std::atoi(argv[++i]));
    } else if (argument == "--random" && i + 1 < argc) {
      options.random_problems = std::atoi(argv[++i]);
    } else if (argument == "--seed" && i + 1 < argc) {
      options.seed = static_cast<uint32_t>(std::atoi(argv[++i]));
    } else {
      std::fprintf(stderr, "unknown argument %s; see the first lines of %s\n", argv[i],
                   "tests/gpu/check_attention.cc");
      return false;
    }
  }
  return true;
}

std::vector<Case> CasesOf(const Options& options) {
  std::vector<Case> cases;
  for (const AttentionProblem& problem : Table()) {
    cases.push_back({NameOf(problem), problem, options.seed});
  }
  for (int i = 0; i < options.random_problems; ++i) {
    const uint32_t seed = options.seed + static_cast<uint32_t>(i);
    std::mt19937 random(seed);
    const AttentionProblem problem = RandomProblem(random);
    cases.push_back({"random_" + NameOf(problem), problem, seed});
  }
  std::erase_if(cases, [&](const Case& c) {
    return !options.only.empty() &&
           std::none_of(options.only.begin(), options.only.end(),
                        [&](const auto& part) {
                          return c.name.find(part) != std::string::npos;
                        });
  });
  const auto skipped = std::min<size_t>(options.skip, cases.size());
  cases.erase(cases.begin(), cases.begin() + static_cast<std::ptrdiff_t>(skipped));
  return cases;
}

}  // namespace
}  // namespace pbs::gpu

int main(int argc, char** argv) {
  pbs::gpu::Options options;
  if (!pbs::gpu::ParseOptions(argc, argv, options)) return 2;
  pbs::gpu::Device device(options.variant);
  int wrong = 0;
  for (const pbs::gpu::Case& c : pbs::gpu::CasesOf(options)) {
    alarm(options.case_seconds);
    wrong += pbs::gpu::Report(device, c.name, c.problem, c.seed) ? 0 : 1;
  }
  alarm(0);
  std::printf("{\"wrong\": %d}\n", wrong);
  return wrong == 0 ? 0 : 1;
}
