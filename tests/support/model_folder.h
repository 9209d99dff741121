// Model folders for tests: tiny, seeded, with random biases and norms, in any dtype and
// any number of shards.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "pbs/check.h"
#include "pbs/dtype.h"

namespace pbs::testing_support {

// A folder that is deleted with everything in it.
class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "pbs-XXXXXX").string();
    PBS_CHECK(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }
  std::string File(std::string_view name) const {
    return path_ + "/" + std::string(name);
  }
  void Write(std::string_view name, std::string_view bytes) const {
    std::ofstream out(File(name), std::ios::binary);
    out << bytes;
    PBS_CHECK(static_cast<bool>(out));
  }

 private:
  std::string path_;
};

// A safetensors file with the given header: u64 length, header, data.
inline std::string RawSafetensors(std::string_view header, std::string_view data) {
  std::string bytes;
  for (int shift = 0; shift < 64; shift += 8) {
    bytes += static_cast<char>((uint64_t{header.size()} >> shift) & 0xFF);
  }
  return bytes.append(header).append(data);
}

struct TestTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::vector<float> values;  // already rounded to dtype
  // If set, the dtype that the file states instead, such as "F8_E4M3", with its bytes.
  std::string stored_dtype = {};
  std::string stored = {};
};

using TensorMap = std::map<std::string, TestTensor>;

inline std::string SafetensorsBytes(const TensorMap& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const size_t begin = data.size();
    const auto count = static_cast<int64_t>(tensor.values.size());
    std::string dtype = tensor.stored_dtype;
    if (dtype.empty()) {
      data.resize(begin + static_cast<size_t>(count * DTypeBytes(tensor.dtype)));
      ConvertElements(tensor.values.data(), DType::kF32, data.data() + begin,
                      tensor.dtype, count);
      dtype = tensor.dtype == DType::kF32   ? "F32"
              : tensor.dtype == DType::kF16 ? "F16"
                                            : "BF16";
    } else {
      data += tensor.stored;
    }
    header[name] = {{"dtype", dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {begin, data.size()}}};
  }
  return RawSafetensors(header.dump(), data);
}

struct TinyModelSpec {
  std::string model_type = "llama";
  int32_t hidden = 48;
  int32_t inner = 80;
  int32_t layers = 2;
  int32_t heads = 4;
  int32_t kv_heads = 2;
  int32_t head_dim = 32;
  int32_t vocab = 97;
  bool tied = false;
  bool attention_bias = false;
  bool mlp_bias = false;
  DType dtype = DType::kF32;
  uint32_t seed = 1;
};

// config.json and tensors, which a test may change before Write().
class TinyModel {
 public:
  explicit TinyModel(const TinyModelSpec& spec) : spec_(spec), random_(spec.seed) {
    MakeConfig();
    MakeTensors();
  }

  nlohmann::json config;
  TensorMap tensors;

  // Writes tensors to `shards` files in turn, so that layers are split between files.
  void Write(const TempFolder& folder, int shards = 1) const {
    folder.Write("config.json", config.dump(2));
    if (shards == 1) {
      folder.Write("model.safetensors", SafetensorsBytes(tensors));
      return;
    }
    std::vector<TensorMap> parts(static_cast<size_t>(shards));
    nlohmann::json weight_map;
    size_t next = 0;
    for (const auto& [name, tensor] : tensors) {
      const size_t part = next++ % parts.size();
      parts[part].emplace(name, tensor);
      weight_map[name] = "part-" + std::to_string(part) + ".safetensors";
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      folder.Write("part-" + std::to_string(i) + ".safetensors",
                   SafetensorsBytes(parts[i]));
    }
    folder.Write("model.safetensors.index.json",
                 nlohmann::json{{"weight_map", weight_map}}.dump());
  }

  TestTensor RandomTensor(std::vector<int64_t> shape, float mean, float spread) {
    TestTensor tensor = {spec_.dtype, std::move(shape), {}};
    int64_t count = 1;
    for (int64_t size : tensor.shape) count *= size;
    std::normal_distribution<float> normal(mean, spread);
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(random_);
      tensor.values.push_back(spec_.dtype == DType::kF32   ? value
                              : spec_.dtype == DType::kF16 ? ToFloat(ToF16(value))
                                                           : ToFloat(ToBf16(value)));
    }
    return tensor;
  }

 private:
  void MakeConfig() {
    config = {{"model_type", spec_.model_type},
              {"vocab_size", spec_.vocab},
              {"hidden_size", spec_.hidden},
              {"intermediate_size", spec_.inner},
              {"num_hidden_layers", spec_.layers},
              {"num_attention_heads", spec_.heads},
              {"num_key_value_heads", spec_.kv_heads},
              {"head_dim", spec_.head_dim},
              {"hidden_act", "silu"},
              {"rms_norm_eps", 1e-5},
              {"max_position_embeddings", 4096},
              {"rope_theta", 10000.0},
              {"tie_word_embeddings", spec_.tied},
              {"eos_token_id", 1}};
    if (spec_.model_type == "llama" || spec_.model_type == "qwen3") {
      config["attention_bias"] = spec_.attention_bias;
    }
    if (spec_.mlp_bias) config["mlp_bias"] = true;
    if (spec_.model_type == "mistral") config["sliding_window"] = nullptr;
  }

  void MakeTensors() {
    const int32_t queries = spec_.heads * spec_.head_dim;
    const int32_t keys = spec_.kv_heads * spec_.head_dim;
    const bool all_biases = spec_.attention_bias && spec_.model_type != "qwen2";
    const bool qkv_biases = all_biases || spec_.model_type == "qwen2";
    Add("model.embed_tokens.weight", {spec_.vocab, spec_.hidden}, 0.0f, 0.5f);
    if (!spec_.tied) AddLinear("lm_head", spec_.vocab, spec_.hidden, false);
    Add("model.norm.weight", {spec_.hidden}, 1.0f, 0.2f);
    for (int32_t layer = 0; layer < spec_.layers; ++layer) {
      const std::string prefix = "model.layers." + std::to_string(layer) + ".";
      Add(prefix + "input_layernorm.weight", {spec_.hidden}, 1.0f, 0.2f);
      Add(prefix + "post_attention_layernorm.weight", {spec_.hidden}, 1.0f, 0.2f);
      AddLinear(prefix + "self_attn.q_proj", queries, spec_.hidden, qkv_biases);
      AddLinear(prefix + "self_attn.k_proj", keys, spec_.hidden, qkv_biases);
      AddLinear(prefix + "self_attn.v_proj", keys, spec_.hidden, qkv_biases);
      AddLinear(prefix + "self_attn.o_proj", spec_.hidden, queries, all_biases);
      AddLinear(prefix + "mlp.gate_proj", spec_.inner, spec_.hidden, spec_.mlp_bias);
      AddLinear(prefix + "mlp.up_proj", spec_.inner, spec_.hidden, spec_.mlp_bias);
      AddLinear(prefix + "mlp.down_proj", spec_.hidden, spec_.inner, spec_.mlp_bias);
      if (spec_.model_type != "qwen3") continue;
      Add(prefix + "self_attn.q_norm.weight", {spec_.head_dim}, 1.0f, 0.2f);
      Add(prefix + "self_attn.k_norm.weight", {spec_.head_dim}, 1.0f, 0.2f);
    }
  }

  void Add(const std::string& name, std::vector<int64_t> shape, float mean,
           float spread) {
    tensors[name] = RandomTensor(std::move(shape), mean, spread);
  }
  void AddLinear(const std::string& name, int32_t out, int32_t in, bool bias) {
    Add(name + ".weight", {out, in}, 0.0f, 1.0f / std::sqrt(static_cast<float>(in)));
    if (bias) Add(name + ".bias", {out}, 0.0f, 0.3f);
  }

  const TinyModelSpec spec_;
  std::mt19937 random_;
};

}  // namespace pbs::testing_support
