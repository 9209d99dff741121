#include "server/model/weights.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/model/json.h"
#include "server/model/tensor_reader.h"

namespace pbs {
namespace {

constexpr std::string_view kEmbedding = "model.embed_tokens.weight";
constexpr std::string_view kHead = "lm_head.weight";
constexpr std::string_view kFinalNorm = "model.norm.weight";
constexpr int64_t kUploadBytes = 4 << 20;

std::string LayerName(int32_t layer, std::string_view part) {
  return "model.layers." + std::to_string(layer) + "." + std::string(part);
}

struct Expected {
  std::string name;
  std::vector<int64_t> shape;
  bool may_be_fp8 = false;
};

// Every tensor that a model of `config` reads.
std::vector<Expected> ExpectedTensors(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  const int64_t queries = config.attention_features();
  const int64_t keys = int64_t{config.num_kv_heads} * config.head_dim;
  std::vector<Expected> tensors = {
      {std::string(kEmbedding), {config.vocab_size, hidden}},
      {std::string(kFinalNorm), {hidden}}};
  if (!config.tied_embeddings) {
    tensors.push_back({std::string(kHead), {config.vocab_size, hidden}});
  }
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    const auto add = [&](std::string_view part, std::vector<int64_t> shape,
                         bool may_be_fp8 = false) {
      tensors.push_back({LayerName(layer, part), std::move(shape), may_be_fp8});
    };
    const auto add_linear = [&](const std::string& part, int64_t out, int64_t in,
                                bool bias) {
      add(part + ".weight", {out, in}, true);
      if (bias) add(part + ".bias", {out});
    };
    add("input_layernorm.weight", {hidden});
    add("post_attention_layernorm.weight", {hidden});
    add_linear("self_attn.q_proj", queries, hidden, config.qkv_bias);
    add_linear("self_attn.k_proj", keys, hidden, config.qkv_bias);
    add_linear("self_attn.v_proj", keys, hidden, config.qkv_bias);
    add_linear("self_attn.o_proj", hidden, queries, config.output_bias);
    add_linear("mlp.gate_proj", inner, hidden, config.mlp_bias);
    add_linear("mlp.up_proj", inner, hidden, config.mlp_bias);
    add_linear("mlp.down_proj", hidden, inner, config.mlp_bias);
    if (config.qk_norm) {
      add("self_attn.q_norm.weight", {config.head_dim});
      add("self_attn.k_norm.weight", {config.head_dim});
    }
  }
  return tensors;
}

Status CheckScale(const Checkpoint& checkpoint, const TensorInfo& weight,
                  const Fp8Format& format) {
  const TensorInfo* scale = FindFp8Scale(checkpoint, weight);
  if (scale == nullptr) {
    const std::vector<std::string> names = Fp8ScaleNames(weight.name);
    return InvalidArgument("tensor " + Quoted(weight.name) + " has dtype " +
                           weight.dtype_name + " and no scales: neither " +
                           Quoted(names[0]) + " nor " + Quoted(names[1]) + " is there");
  }
  if (!scale->dtype.has_value()) {
    return InvalidArgument("tensor " + Quoted(scale->name) + " has dtype " +
                           scale->dtype_name + ", which is not one of F32, F16, BF16");
  }
  return ScaleGridOf(weight, *scale, format).status();
}

Status CheckTensor(const Checkpoint& checkpoint, const Expected& expected,
                   const Fp8Format& format) {
  const std::string where = "tensor " + Quoted(expected.name) + " ";
  const TensorInfo* tensor = checkpoint.Find(expected.name);
  if (tensor == nullptr) {
    const std::string shard = checkpoint.PromisedIn(expected.name);
    return InvalidArgument(
        where + "is missing" +
        (shard.empty() ? "" : ": the index promises it in " + Quoted(shard)));
  }
  if (tensor->shape != expected.shape) {
    return InvalidArgument(where + "has shape " + ShapeText(tensor->shape) +
                           "; the config asks for " + ShapeText(expected.shape));
  }
  if (expected.may_be_fp8 && IsFp8(*tensor)) {
    return CheckScale(checkpoint, *tensor, format);
  }
  if (!tensor->dtype.has_value()) {
    return InvalidArgument(where + "has dtype " + tensor->dtype_name +
                           ", which is not one of F32, F16, BF16");
  }
  return OkStatus();
}

// A tied model's files may repeat the embedding as the head; it must be the same one.
Status CheckRepeatedHead(const Checkpoint& checkpoint, const TensorInfo& head,
                         const LoadControl& control) {
  const TensorInfo& embedding = *checkpoint.Find(kEmbedding);
  bool equal = head.shape == embedding.shape && head.dtype == embedding.dtype;
  std::vector<char> a(static_cast<size_t>(kUploadBytes));
  std::vector<char> b(a.size());
  for (int64_t at = 0; equal && at < head.bytes; at += kUploadBytes) {
    if (control.stop != nullptr && control.stop->load(std::memory_order_relaxed)) {
      return Cancelled("loading was stopped while \"lm_head.weight\" was compared");
    }
    const int64_t count = std::min(kUploadBytes, head.bytes - at);
    PBS_RETURN_IF_ERROR(checkpoint.Read(head, at, count, a.data()));
    PBS_RETURN_IF_ERROR(checkpoint.Read(embedding, at, count, b.data()));
    equal = std::memcmp(a.data(), b.data(), static_cast<size_t>(count)) == 0;
  }
  if (equal) return OkStatus();
  return InvalidArgument(
      "tensor \"lm_head.weight\" differs from the embedding, but the config says "
      "tie_word_embeddings true");
}

// Old Llama folders store what is computed from the config; quantised ones store what
// quantises activations and caches.
bool IsHarmless(std::string_view name) {
  return name.ends_with(".rotary_emb.inv_freq") || IsActivationScale(name);
}

// Returns the bytes that will be read.
StatusOr<int64_t> CheckTensors(const Checkpoint& checkpoint, const ModelConfig& config,
                               const LoadControl& control) {
  std::set<std::string, std::less<>> used;
  int64_t bytes = 0;
  for (const Expected& expected : ExpectedTensors(config)) {
    PBS_RETURN_IF_ERROR(CheckTensor(checkpoint, expected, config.fp8));
    const TensorInfo& tensor = *checkpoint.Find(expected.name);
    bytes += tensor.bytes;
    used.insert(expected.name);
    if (!IsFp8(tensor)) continue;
    const TensorInfo& scale = *FindFp8Scale(checkpoint, tensor);
    bytes += scale.bytes;
    used.insert(scale.name);
  }
  for (const TensorInfo& tensor : checkpoint.tensors()) {
    if (used.contains(tensor.name) || IsHarmless(tensor.name)) continue;
    if (tensor.name == kHead) {  // the config says that it is tied
      PBS_RETURN_IF_ERROR(CheckRepeatedHead(checkpoint, tensor, control));
      continue;
    }
    return InvalidArgument("tensor " + Quoted(tensor.name) + " does not belong to a " +
                           ArchitectureName(config.architecture) + " model of " +
                           std::to_string(config.num_layers) + " layers");
  }
  return bytes;
}

class Loader {
 public:
  Loader(ReadSession& session, const ModelConfig& config, Backend& backend)
      : session_(session), config_(config), backend_(backend) {}

  StatusOr<ModelWeights> Load() {
    weights_.compute_dtype = CommonComputeDType();
    PBS_RETURN_IF_ERROR(
        LoadTable(kEmbedding, weights_.embedding, weights_.embedding_dtype));
    weights_.head_dtype = weights_.embedding_dtype;
    if (!config_.tied_embeddings) {
      PBS_RETURN_IF_ERROR(LoadTable(kHead, weights_.head, weights_.head_dtype));
    }
    weights_.layers.resize(static_cast<size_t>(config_.num_layers));
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      PBS_RETURN_IF_ERROR(LoadLayer(layer));
    }
    PBS_RETURN_IF_ERROR(LoadNorms());
    weights_.digest = session_.digest.Finish();
    weights_.notes = session_.checkpoint.notes();
    return std::move(weights_);
  }

 private:
  const TensorInfo& Tensor(std::string_view name) const {
    return *session_.checkpoint.Find(name);
  }

  // That of every projection; where they differ, that of f32, so that no activation is
  // converted on its way.
  DType CommonComputeDType() const {
    std::optional<DType> common;
    for (const TensorInfo& tensor : session_.checkpoint.tensors()) {
      if (!tensor.name.ends_with("_proj.weight")) continue;
      const DType stored = WeightReader(session_, tensor).dtype();
      const DType own = backend_.ComputeDType(stored);
      if (own != common.value_or(own)) return backend_.ComputeDType(DType::kF32);
      common = own;
    }
    return common.value_or(backend_.ComputeDType(DType::kF32));
  }

  Status LoadTable(std::string_view name, Buffer& table, DType& dtype) {
    const TensorInfo& tensor = Tensor(name);
    dtype = *tensor.dtype;
    PBS_ASSIGN_OR_RETURN(table, backend_.Allocate(tensor.bytes));
    weights_.bytes += tensor.bytes;
    TensorReader reader(session_, tensor);
    std::vector<char> part(static_cast<size_t>(kUploadBytes));
    for (int64_t at = 0; at < tensor.bytes; at += kUploadBytes) {
      const int64_t count = std::min(kUploadBytes, tensor.bytes - at);
      PBS_RETURN_IF_ERROR(reader.Read(count, part.data()));
      PBS_RETURN_IF_ERROR(
          backend_.Upload(part.data(), static_cast<char*>(table.data()) + at, count));
    }
    return OkStatus();
  }

  // Linear layer of the stacked projections `parts` of a layer.
  StatusOr<std::unique_ptr<PackedLinear>> LoadLinear(
      int32_t layer, std::initializer_list<std::string_view> parts, bool bias,
      LinearEpilogue epilogue) {
    std::vector<const TensorInfo*> tensors;
    std::vector<float> biases;
    for (std::string_view part : parts) {
      const std::string name = LayerName(layer, part);
      tensors.push_back(&Tensor(name + ".weight"));
      if (!bias) continue;
      PBS_ASSIGN_OR_RETURN(const std::vector<float> values,
                           ReadAsFloats(session_, Tensor(name + ".bias")));
      biases.insert(biases.end(), values.begin(), values.end());
    }
    StackedRows rows(session_, tensors);
    LinearSpec spec = {.in_features = tensors[0]->shape[1],
                       .out_features = rows.num_rows(),
                       .weight_dtype = rows.dtype(),
                       .compute_dtype = weights_.compute_dtype,
                       .epilogue = epilogue};
    spec.x_stride = spec.in_features;
    spec.y_stride =
        epilogue == LinearEpilogue::kSwiGlu ? spec.out_features / 2 : spec.out_features;
    const RowReader read = [&rows](int64_t, int64_t count, void* target) {
      return rows.Read(count, target);
    };
    PBS_ASSIGN_OR_RETURN(auto linear, backend_.PackLinear(spec, read, biases));
    weights_.bytes += linear->bytes;
    return StatusOr<std::unique_ptr<PackedLinear>>(std::move(linear));
  }

  Status LoadLayer(int32_t index) {
    LayerWeights& layer = weights_.layers[static_cast<size_t>(index)];
    PBS_ASSIGN_OR_RETURN(
        layer.qkv,
        LoadLinear(index, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                   config_.qkv_bias, LinearEpilogue::kStore));
    PBS_ASSIGN_OR_RETURN(layer.output,
                         LoadLinear(index, {"self_attn.o_proj"}, config_.output_bias,
                                    LinearEpilogue::kAdd));
    PBS_ASSIGN_OR_RETURN(layer.gate_up,
                         LoadLinear(index, {"mlp.gate_proj", "mlp.up_proj"},
                                    config_.mlp_bias, LinearEpilogue::kSwiGlu));
    PBS_ASSIGN_OR_RETURN(
        layer.down,
        LoadLinear(index, {"mlp.down_proj"}, config_.mlp_bias, LinearEpilogue::kAdd));
    return OkStatus();
  }

  // All norm weights in one buffer, each on a 64-byte boundary.
  Status LoadNorms() {
    constexpr int64_t kAlignFloats = 16;
    const int64_t hidden = (config_.hidden_size + kAlignFloats - 1) & -kAlignFloats;
    const int64_t head = config_.qk_norm ? config_.head_dim : 0;  // a multiple of 32
    const int64_t floats = hidden + config_.num_layers * 2 * (hidden + head);
    PBS_ASSIGN_OR_RETURN(weights_.norms, backend_.Allocate(floats * 4));
    weights_.bytes += weights_.norms.bytes();
    auto* next = static_cast<float*>(weights_.norms.data());
    const auto load = [&](const std::string& name, int64_t room,
                          const float*& target) -> Status {
      PBS_ASSIGN_OR_RETURN(const std::vector<float> values,
                           ReadAsFloats(session_, Tensor(name)));
      PBS_RETURN_IF_ERROR(backend_.Upload(
          values.data(), next, static_cast<int64_t>(values.size() * sizeof(float))));
      target = std::exchange(next, next + room);
      return OkStatus();
    };
    PBS_RETURN_IF_ERROR(load(std::string(kFinalNorm), hidden, weights_.final_norm));
    for (int32_t i = 0; i < config_.num_layers; ++i) {
      LayerWeights& layer = weights_.layers[static_cast<size_t>(i)];
      const auto name = [i](std::string_view part) { return LayerName(i, part); };
      PBS_RETURN_IF_ERROR(
          load(name("input_layernorm.weight"), hidden, layer.attention_norm));
      PBS_RETURN_IF_ERROR(
          load(name("post_attention_layernorm.weight"), hidden, layer.mlp_norm));
      if (!config_.qk_norm) continue;
      PBS_RETURN_IF_ERROR(load(name("self_attn.q_norm.weight"), head, layer.q_norm));
      PBS_RETURN_IF_ERROR(load(name("self_attn.k_norm.weight"), head, layer.k_norm));
    }
    return OkStatus();
  }

  ReadSession& session_;
  const ModelConfig& config_;
  Backend& backend_;
  ModelWeights weights_;
};

}  // namespace

StatusOr<ModelWeights> LoadWeights(const Checkpoint& checkpoint,
                                   const ModelConfig& config, Backend& backend,
                                   const LoadControl& control) {
  PBS_ASSIGN_OR_RETURN(const int64_t bytes, CheckTensors(checkpoint, config, control));
  ReadSession session = {.checkpoint = checkpoint,
                         .control = control,
                         .fp8 = config.fp8,
                         .digest = ModelDigest(CanonicalArchitecture(config)),
                         .bytes_total = bytes};
  return Loader(session, config, backend).Load();
}

}  // namespace pbs
