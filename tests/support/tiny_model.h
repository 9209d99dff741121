// Model folders for tests: a Llama of any small size with random weights, on disk.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <ios>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "pbs/check.h"
#include "pbs/dtype.h"

namespace pbs::testing_support {

struct TinyLlama {
  int32_t num_layers = 3;
  int32_t hidden_size = 64;
  int32_t num_heads = 4;
  int32_t num_kv_heads = 2;
  int32_t head_dim = 32;
  int32_t intermediate_size = 96;
  int32_t vocab_size = 128;
  int32_t positions_max = 8192;
  DType dtype = DType::kF32;
  uint32_t seed = 1;
  bool zeros = false;  // all weights are 0, so that the file takes no space on disk
};

// The folder of one model, removed with this object. Norms and biases are random too:
// a loader that ignores them gives other logits.
class TinyModelFolder {
 public:
  explicit TinyModelFolder(const TinyLlama& model = {}) : model_(model) {
    path_ = std::filesystem::temp_directory_path() /
            ("pbs_tiny_model_" + std::to_string(std::random_device{}()));
    std::filesystem::create_directories(path_);
    WriteConfig();
    AddTensors();
    WriteWeights();
  }
  ~TinyModelFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TinyModelFolder(const TinyModelFolder&) = delete;
  TinyModelFolder& operator=(const TinyModelFolder&) = delete;

  std::string path() const { return path_.string(); }

 private:
  struct Tensor {
    std::string name;
    std::vector<int64_t> shape;
    float mean = 0;
    float deviation = 1;

    int64_t elements() const {
      int64_t count = 1;
      for (int64_t dimension : shape) count *= dimension;
      return count;
    }
  };

  void WriteConfig() const {
    const auto number = [](int64_t value) { return std::to_string(value); };
    std::ofstream(path_ / "config.json")
        << "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"]"
        << ",\"vocab_size\":" + number(model_.vocab_size)
        << ",\"hidden_size\":" + number(model_.hidden_size)
        << ",\"intermediate_size\":" + number(model_.intermediate_size)
        << ",\"num_hidden_layers\":" + number(model_.num_layers)
        << ",\"num_attention_heads\":" + number(model_.num_heads)
        << ",\"num_key_value_heads\":" + number(model_.num_kv_heads)
        << ",\"head_dim\":" + number(model_.head_dim)
        << ",\"max_position_embeddings\":" + number(model_.positions_max)
        << ",\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0"
        << ",\"attention_bias\":true,\"tie_word_embeddings\":false"
        << ",\"eos_token_id\":[1]}";
  }

  void AddTensors() {
    const int64_t hidden = model_.hidden_size;
    const int64_t queries = int64_t{model_.num_heads} * model_.head_dim;
    const int64_t keys = int64_t{model_.num_kv_heads} * model_.head_dim;
    const int64_t inner = model_.intermediate_size;
    const auto linear = [this](const std::string& name, int64_t out, int64_t in,
                               bool bias) {
      const float deviation = 1 / std::sqrt(static_cast<float>(in));
      tensors_.push_back({name + ".weight", {out, in}, 0, deviation});
      if (bias) tensors_.push_back({name + ".bias", {out}, 0, 0.1f});
    };
    const auto norm = [this, hidden](const std::string& name) {
      tensors_.push_back({name + ".weight", {hidden}, 1, 0.1f});
    };
    tensors_.push_back({"model.embed_tokens.weight", {model_.vocab_size, hidden}});
    for (int32_t i = 0; i < model_.num_layers; ++i) {
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      norm(layer + "input_layernorm");
      norm(layer + "post_attention_layernorm");
      linear(layer + "self_attn.q_proj", queries, hidden, true);
      linear(layer + "self_attn.k_proj", keys, hidden, true);
      linear(layer + "self_attn.v_proj", keys, hidden, true);
      linear(layer + "self_attn.o_proj", hidden, queries, true);
      linear(layer + "mlp.gate_proj", inner, hidden, false);
      linear(layer + "mlp.up_proj", inner, hidden, false);
      linear(layer + "mlp.down_proj", hidden, inner, false);
    }
    norm("model.norm");
    linear("lm_head", model_.vocab_size, hidden, false);
  }

  void WriteWeights() const {
    std::string header = "{";
    int64_t offset = 0;
    for (const Tensor& tensor : tensors_) {
      const int64_t end = offset + tensor.elements() * DTypeBytes(model_.dtype);
      std::string shape;
      for (int64_t dimension : tensor.shape) {
        shape += (shape.empty() ? "" : ",") + std::to_string(dimension);
      }
      header += (offset == 0 ? "\"" : ",\"") + tensor.name + "\":{\"dtype\":\"" +
                FileDType() + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
                std::to_string(offset) + "," + std::to_string(end) + "]}";
      offset = end;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    std::ofstream file(path_ / "model.safetensors", std::ios::binary);
    const auto length = static_cast<uint64_t>(header.size());
    for (int byte = 0; byte < 8; ++byte) {
      file.put(static_cast<char>(length >> (8 * byte)));
    }
    file << header;
    if (!model_.zeros) WriteData(file);
    PBS_CHECK(file.good());
    if (!model_.zeros) return;
    file.close();
    std::filesystem::resize_file(path_ / "model.safetensors",
                                 8 + header.size() + static_cast<size_t>(offset));
  }

  void WriteData(std::ofstream& file) const {
    std::mt19937 random(model_.seed);
    std::normal_distribution<float> normal;
    for (const Tensor& tensor : tensors_) {
      std::vector<float> values(static_cast<size_t>(tensor.elements()));
      for (float& value : values) {
        value = tensor.mean + tensor.deviation * normal(random);
      }
      std::vector<char> bytes(values.size() *
                              static_cast<size_t>(DTypeBytes(model_.dtype)));
      ConvertElements(values.data(), DType::kF32, bytes.data(), model_.dtype,
                      tensor.elements());
      file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
  }

  std::string FileDType() const {
    return model_.dtype == DType::kF32   ? "F32"
           : model_.dtype == DType::kF16 ? "F16"
                                         : "BF16";
  }

  const TinyLlama model_;
  std::filesystem::path path_;
  std::vector<Tensor> tensors_;
};

}  // namespace pbs::testing_support
