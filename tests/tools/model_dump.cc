// Runs a model folder on a prompt and writes down what came out, for comparison with
// other implementations.
//
//   model_dump MODEL_DIR TOKENS.json OUT.safetensors [options]
//
// TOKENS.json is a list of token ids. OUT gets `logits` f32 [rows, vocab] and, per
// layer, `layers.N.k` and `layers.N.v` [kv_heads, tokens, head_dim] in the cache's
// dtype. One JSON line on stdout has the rest: greedy tokens, digest, densities,
// seconds, bytes.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <ios>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pbs/cpu_backend.h"
#include "server/model/decode.h"
#include "server/model/file.h"
#include "server/model/json.h"
#include "server/model/model.h"
#include "server/model/prefill.h"
#include "server/model/sampling.h"

namespace pbs {
namespace {

constexpr const char* kUsage =
    "usage: model_dump MODEL_DIR TOKENS.json OUT.safetensors|none\n"
    "  [--threads N] [--compute auto|f32|bf16] [--isa NAME] [--kv-dtype f32|f16|bf16]\n"
    "  [--method NAME] [--block-size N] [--segment-size N]\n"
    "  [--threshold T] [--last-logits N (0: all)] [--new-tokens N]\n";

struct Arguments {
  std::string folder, tokens_path, out_path;
  CpuBackendOptions backend = {.num_threads = 1};
  ModelOptions model;
  AttentionOptions attention = {.method = Method::kDense};
  int32_t last_logits = 1;
  int32_t new_tokens = 0;
};

Status ParseMethod(const std::string& name, Method& method) {
  for (Method known : kMethods) {
    if (name != MethodName(known)) continue;
    method = known;
    return OkStatus();
  }
  return InvalidArgument("method " + Quoted(name) + " is unknown");
}

Status ParseOption(const std::string& key, const std::string& value,
                   Arguments& arguments) {
  const std::map<std::string, int32_t*> numbers = {
      {"--threads", &arguments.backend.num_threads},
      {"--block-size", &arguments.attention.block_size},
      {"--segment-size", &arguments.attention.segment_size},
      {"--last-logits", &arguments.last_logits},
      {"--new-tokens", &arguments.new_tokens}};
  if (const auto number = numbers.find(key); number != numbers.end()) {
    *number->second = std::atoi(value.c_str());
  } else if (key == "--threshold") {
    arguments.attention.threshold = std::strtof(value.c_str(), nullptr);
  } else if (key == "--isa") {
    arguments.backend.isa = value;
  } else if (key == "--compute") {
    PBS_ASSIGN_OR_RETURN(arguments.backend.compute, ParseComputePreference(value));
  } else if (key == "--kv-dtype") {
    PBS_ASSIGN_OR_RETURN(arguments.model.kv_dtype, ParseDType(value));
  } else if (key == "--method") {
    return ParseMethod(value, arguments.attention.method);
  } else {
    return InvalidArgument("unknown option " + Quoted(key));
  }
  return OkStatus();
}

StatusOr<Arguments> ParseArguments(int argc, char** argv) {
  if (argc < 4 || argc % 2 != 0) return InvalidArgument(kUsage);
  Arguments arguments;
  arguments.folder = argv[1];
  arguments.tokens_path = argv[2];
  arguments.out_path = argv[3];
  for (int i = 4; i < argc; i += 2) {
    PBS_RETURN_IF_ERROR(ParseOption(argv[i], argv[i + 1], arguments));
  }
  return arguments;
}

StatusOr<std::vector<int32_t>> ReadTokens(const std::string& path) {
  PBS_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, 64 << 20));
  PBS_ASSIGN_OR_RETURN(
      const nlohmann::json root,
      ParseJson(text, path, {.bytes_max = 64 << 20, .values_max = kSeqLenMax + 1}));
  std::vector<int32_t> tokens;
  for (const nlohmann::json& token : root) {
    if (!token.is_number_integer())
      return InvalidArgument(path + ": not a list of ids");
    tokens.push_back(token.get<int32_t>());
  }
  return tokens;
}

// Collects tensors and writes them as one safetensors file.
class TensorFile {
 public:
  void Add(const std::string& name, const char* dtype, std::vector<int64_t> shape,
           const void* bytes, int64_t count) {
    const auto begin = static_cast<int64_t>(data_.size());
    data_.append(static_cast<const char*>(bytes), static_cast<size_t>(count));
    header_[name] = {{"dtype", dtype},
                     {"shape", std::move(shape)},
                     {"data_offsets", {begin, begin + count}}};
  }

  Status Write(const std::string& path) const {
    const std::string header = header_.dump();
    const uint64_t length = header.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), sizeof(length));
    out << header << data_;
    out.close();
    return out ? OkStatus() : FailedPrecondition("cannot write " + path);
  }

 private:
  nlohmann::json header_ = nlohmann::json::object();
  std::string data_;
};

void AddCache(const KvCache& cache, TensorFile& file) {
  const KvShape& shape = cache.shape();
  const char* dtype = shape.dtype == DType::kF32   ? "F32"
                      : shape.dtype == DType::kF16 ? "F16"
                                                   : "BF16";
  const int64_t row = int64_t{shape.head_dim} * DTypeBytes(shape.dtype);
  const int64_t bytes = cache.num_tokens() * row;
  for (int32_t layer = 0; layer < shape.num_layers; ++layer) {
    for (const bool is_key : {true, false}) {
      const auto* plane =
          static_cast<const char*>(is_key ? cache.k(layer) : cache.v(layer));
      std::string packed;
      for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
        packed.append(plane + head * shape.capacity * row, static_cast<size_t>(bytes));
      }
      file.Add("layers." + std::to_string(layer) + (is_key ? ".k" : ".v"), dtype,
               {shape.num_kv_heads, cache.num_tokens(), shape.head_dim}, packed.data(),
               static_cast<int64_t>(packed.size()));
    }
  }
}

class LayerCollector : public PrefillObserver {
 public:
  void OnKvReady(int32_t) override {}
  void OnLayerDone(const LayerReport& report) override {
    densities_.push_back(report.attention.Density());
    Add("qkv", report.qkv_seconds);
    Add("permute", report.attention.permute_seconds);
    Add("select", report.attention.select_seconds);
    Add("attend", report.attention.attend_seconds);
    Add("mlp", report.mlp_seconds);
    Add("layers", report.seconds);
  }
  nlohmann::json densities_ = nlohmann::json::array();
  nlohmann::json seconds_ = nlohmann::json::object();

 private:
  void Add(const char* stage, double seconds) {
    seconds_[stage] = seconds_.value(stage, 0.0) + seconds;
  }
};

// Reads all wanted logits; the last row is left in `last`.
Status AddLogits(PrefillRun& run, const PrefillPlan& plan, TensorFile& file,
                 std::vector<float>& last) {
  std::vector<float> all;
  const auto rows = static_cast<int32_t>(plan.problem.logit_rows.size());
  for (int32_t i = 0; i < rows; ++i) {
    PBS_RETURN_IF_ERROR(run.ReadLogits(i, last));
    all.insert(all.end(), last.begin(), last.end());
  }
  file.Add("logits", "F32", {rows, static_cast<int64_t>(last.size())}, all.data(),
           static_cast<int64_t>(all.size() * sizeof(float)));
  return OkStatus();
}

StatusOr<nlohmann::json> Decode(const Model& model, KvCache& cache,
                                std::vector<float> logits, int32_t new_tokens) {
  nlohmann::json generated = nlohmann::json::array();
  PBS_ASSIGN_OR_RETURN(auto decoder, Decoder::Create(model, cache));
  for (int32_t i = 0; i < new_tokens; ++i) {
    const int32_t token = Argmax(logits);
    generated.push_back(token);
    if (i + 1 == new_tokens) break;
    PBS_ASSIGN_OR_RETURN(const auto next, decoder->Step(token));
    logits.assign(next.begin(), next.end());
  }
  return generated;
}

// A field of /proc/self/status in bytes.
int64_t ProcessBytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with(field + ":")) {
      return std::atoll(line.c_str() + field.size() + 1) * 1024;
    }
  }
  return 0;
}

// One prefill from an empty cache to logits.
Status RunPrefill(const Model& model, const PrefillPlan& plan,
                  std::span<const int32_t> tokens, KvCache& cache, Workspace workspace,
                  PrefillObserver& observer, TensorFile& file,
                  std::vector<float>& logits, double& embed_seconds) {
  PBS_ASSIGN_OR_RETURN(
      auto run, PrefillRun::Start(model, plan, {.tokens = tokens}, cache, workspace));
  while (!run->layers_done()) PBS_RETURN_IF_ERROR(run->RunLayer(&observer, {}));
  PBS_RETURN_IF_ERROR(run->ComputeLogits());
  embed_seconds = run->embed_seconds();
  return AddLogits(*run, plan, file, logits);
}

Status Dump(const Arguments& arguments) {
  PBS_ASSIGN_OR_RETURN(auto backend, CreateCpuBackend(arguments.backend));
  PBS_ASSIGN_OR_RETURN(auto model,
                       Model::Load(arguments.folder, arguments.model, *backend));
  PBS_ASSIGN_OR_RETURN(const auto tokens, ReadTokens(arguments.tokens_path));
  const auto num_tokens = static_cast<int32_t>(tokens.size());
  PrefillProblem problem = {.num_tokens = num_tokens, .attention = arguments.attention};
  const int32_t wanted =
      arguments.last_logits == 0 ? num_tokens : arguments.last_logits;
  for (int32_t i = num_tokens - wanted; i < num_tokens; ++i) {
    problem.logit_rows.push_back(i);
  }
  PBS_ASSIGN_OR_RETURN(const PrefillPlan plan, PlanPrefill(*model, problem));
  const int64_t resident_before = ProcessBytes("VmRSS");
  PBS_ASSIGN_OR_RETURN(
      KvCache cache,
      KvCache::Create(model->kv_shape(num_tokens + arguments.new_tokens), *backend));
  TensorFile file;
  LayerCollector layers;
  std::vector<float> logits(static_cast<size_t>(model->config().vocab_size));
  double embed_seconds = 0;
  {
    PBS_ASSIGN_OR_RETURN(Buffer workspace, backend->Allocate(plan.workspace_bytes));
    PBS_RETURN_IF_ERROR(RunPrefill(*model, plan, tokens, cache, workspace.workspace(),
                                   layers, file, logits, embed_seconds));
  }
  const int64_t resident_peak = ProcessBytes("VmHWM");
  if (arguments.out_path != "none") {
    AddCache(cache, file);
    PBS_RETURN_IF_ERROR(file.Write(arguments.out_path));
  }
  PBS_ASSIGN_OR_RETURN(const nlohmann::json generated,
                       Decode(*model, cache, logits, arguments.new_tokens));
  layers.seconds_["embed"] = embed_seconds;
  const nlohmann::json line = {
      {"tokens", num_tokens},
      {"digest", model->digest()},
      {"compute_dtype", DTypeName(model->compute_dtype())},
      {"kv_dtype", DTypeName(model->kv_dtype())},
      {"isa", backend->info().isa},
      {"greedy", generated},
      {"density", layers.densities_},
      {"seconds", layers.seconds_},
      {"weight_bytes", model->weight_bytes()},
      {"planned_bytes", plan.workspace_bytes + cache.shape().bytes()},
      {"measured_bytes", resident_peak - resident_before}};
  std::printf("%s\n", line.dump().c_str());
  return OkStatus();
}

}  // namespace
}  // namespace pbs

int main(int argc, char** argv) {
  const auto arguments = pbs::ParseArguments(argc, argv);
  const pbs::Status status =
      arguments.ok() ? pbs::Dump(*arguments) : arguments.status();
  if (status.ok()) return 0;
  std::fprintf(stderr, "model_dump: %s\n", status.ToString().c_str());
  return 1;
}
