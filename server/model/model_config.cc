#include "server/model/model_config.h"

#include <algorithm>
#include <cstdio>
#include <string>

#include "server/model/json.h"

namespace pbs {
namespace {

constexpr const char* kWhere = "config.json";

Status Unsupported(const JsonObject& config, const std::string& message) {
  return Unimplemented(config.Error(message).message());
}

StatusOr<int32_t> Size(const JsonObject& config, std::string_view key, int32_t high) {
  PBS_ASSIGN_OR_RETURN(const int64_t value, config.Int(key, 1, high));
  return static_cast<int32_t>(value);
}

StatusOr<Architecture> ParseArchitecture(const JsonObject& config) {
  struct Known {
    Architecture architecture;
    const char* class_name;
  };
  constexpr Known kKnown[] = {{Architecture::kLlama, "LlamaForCausalLM"},
                              {Architecture::kMistral, "MistralForCausalLM"},
                              {Architecture::kQwen2, "Qwen2ForCausalLM"},
                              {Architecture::kQwen3, "Qwen3ForCausalLM"}};
  PBS_ASSIGN_OR_RETURN(const std::string type, config.String("model_type"));
  const auto known = std::find_if(std::begin(kKnown), std::end(kKnown), [&](auto& k) {
    return type == ArchitectureName(k.architecture);
  });
  if (known == std::end(kKnown)) {
    return Unsupported(config, "model_type " + Quoted(type) +
                                   " is not one of llama, mistral, qwen2, qwen3");
  }
  if (config.Has("architectures")) {
    PBS_ASSIGN_OR_RETURN(const nlohmann::json* names, config.Array("architectures"));
    for (const nlohmann::json& name : *names) {
      if (name != known->class_name) {
        return Unsupported(config, "architectures holds " + Quoted(name.dump()) +
                                       "; model_type " + type + " is served as " +
                                       known->class_name);
      }
    }
  }
  return known->architecture;
}

// Hugging Face's classes disagree about what a missing key means: llama takes as many
// KV heads as heads, the others a number of their own.
Status ParseHeads(const JsonObject& config, ModelConfig& model) {
  PBS_ASSIGN_OR_RETURN(model.num_heads,
                       Size(config, "num_attention_heads", kNumHeadsMax));
  const bool spelled = config.json().contains("num_key_value_heads");
  if (!spelled && model.architecture != Architecture::kLlama) {
    return config.Error("num_key_value_heads is missing");
  }
  PBS_ASSIGN_OR_RETURN(
      const int64_t kv_heads,
      config.IntOr("num_key_value_heads", model.num_heads, 1, model.num_heads));
  model.num_kv_heads = static_cast<int32_t>(kv_heads);
  if (model.num_heads % model.num_kv_heads != 0) {
    return config.Error("num_attention_heads " + std::to_string(model.num_heads) +
                        " is not a multiple of num_key_value_heads " +
                        std::to_string(model.num_kv_heads));
  }
  if (!config.Has("head_dim")) {
    if (model.architecture == Architecture::kQwen3) {
      return config.Error("head_dim is missing");
    }
    if (model.hidden_size % model.num_heads != 0) {
      return config.Error("hidden_size " + std::to_string(model.hidden_size) +
                          " is not a multiple of num_attention_heads " +
                          std::to_string(model.num_heads) +
                          ", and head_dim is missing");
    }
  }
  PBS_ASSIGN_OR_RETURN(const int64_t head_dim,
                       config.IntOr("head_dim", model.hidden_size / model.num_heads, 1,
                                    kHeadDims.back()));
  model.head_dim = static_cast<int32_t>(head_dim);
  if (std::count(kHeadDims.begin(), kHeadDims.end(), model.head_dim) == 0) {
    return Unsupported(config, "head_dim " + std::to_string(model.head_dim) +
                                   " is not one of 32, 64, 96, 128, 256");
  }
  return OkStatus();
}

Status ParseSizes(const JsonObject& config, ModelConfig& model) {
  PBS_ASSIGN_OR_RETURN(model.vocab_size, Size(config, "vocab_size", kVocabSizeMax));
  PBS_ASSIGN_OR_RETURN(model.hidden_size, Size(config, "hidden_size", kHiddenSizeMax));
  PBS_ASSIGN_OR_RETURN(model.intermediate_size,
                       Size(config, "intermediate_size", kIntermediateSizeMax));
  PBS_ASSIGN_OR_RETURN(model.num_layers, Size(config, "num_hidden_layers", kLayersMax));
  PBS_ASSIGN_OR_RETURN(const double epsilon,
                       config.Number("rms_norm_eps", 1e-12, 1e-1));
  model.rms_norm_epsilon = static_cast<float>(epsilon);
  return ParseHeads(config, model);
}

// Which parts have biases follows from the architecture, and for some from the config.
Status ParseVariants(const JsonObject& config, ModelConfig& model) {
  const Architecture architecture = model.architecture;
  PBS_ASSIGN_OR_RETURN(model.tied_embeddings,
                       config.BoolOr("tie_word_embeddings", false));
  PBS_ASSIGN_OR_RETURN(const bool attention_bias,
                       config.BoolOr("attention_bias", false));
  PBS_ASSIGN_OR_RETURN(model.mlp_bias, config.BoolOr("mlp_bias", false));
  if (model.mlp_bias && architecture != Architecture::kLlama) {
    return Unsupported(config, std::string("mlp_bias true is unknown for ") +
                                   ArchitectureName(architecture));
  }
  switch (architecture) {
    case Architecture::kLlama:
    case Architecture::kQwen3:
      model.qkv_bias = attention_bias;
      model.output_bias = attention_bias;
      break;
    case Architecture::kQwen2:
      model.qkv_bias = true;  // always, and the key does not exist
      break;
    case Architecture::kMistral:
      if (attention_bias) {
        return Unsupported(config, "attention_bias true is unknown for mistral");
      }
      break;
  }
  model.qk_norm = architecture == Architecture::kQwen3;
  return OkStatus();
}

Status RefuseWhatChangesTheResult(const JsonObject& config, const ModelConfig& model) {
  if (config.Has("hidden_act")) {
    PBS_ASSIGN_OR_RETURN(const std::string activation, config.String("hidden_act"));
    if (activation != "silu") {
      return Unsupported(
          config, "hidden_act " + Quoted(activation) + " is not supported, only silu");
    }
  }
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (config.Has(key)) {
      return Unsupported(
          config, std::string(key) + " is set: quantised weights are not supported");
    }
  }
  PBS_ASSIGN_OR_RETURN(const double partial,
                       config.NumberOr("partial_rotary_factor", 1, 0, 1));
  if (partial != 1) {
    return Unsupported(config, "partial_rotary_factor " + NumberText(partial) +
                                   " is not supported, only 1");
  }
  PBS_ASSIGN_OR_RETURN(const bool mrope, config.BoolOr("use_mrope", false));
  if (mrope) return Unsupported(config, "use_mrope true is not supported");
  if (!config.Has("layer_types")) return OkStatus();
  PBS_ASSIGN_OR_RETURN(const nlohmann::json* types, config.Array("layer_types"));
  if (static_cast<int64_t>(types->size()) != model.num_layers) {
    return config.Error("layer_types has " + std::to_string(types->size()) +
                        " entries for " + std::to_string(model.num_layers) + " layers");
  }
  for (const nlohmann::json& type : *types) {
    if (type != "full_attention") {
      return Unsupported(config, "layer_types holds " + Quoted(type.dump()) +
                                     "; only full_attention is supported");
    }
  }
  return OkStatus();
}

// A window that no served prompt reaches changes nothing; any other is refused.
Status CheckSlidingWindow(const JsonObject& config, const ModelConfig& model) {
  const bool is_qwen = model.architecture == Architecture::kQwen2 ||
                       model.architecture == Architecture::kQwen3;
  if (is_qwen) {
    PBS_ASSIGN_OR_RETURN(const bool used, config.BoolOr("use_sliding_window", false));
    if (!used) return OkStatus();
    PBS_ASSIGN_OR_RETURN(const int64_t full_layers,
                         config.Int("max_window_layers", 0, INT32_MAX));
    if (full_layers >= model.num_layers) return OkStatus();  // no layer slides
  }
  if (model.architecture == Architecture::kMistral &&
      !config.json().contains("sliding_window")) {
    return config.Error("sliding_window is missing");  // Hugging Face would take 4096
  }
  if (!config.Has("sliding_window")) return OkStatus();
  PBS_ASSIGN_OR_RETURN(const int64_t window,
                       config.Int("sliding_window", 1, INT32_MAX));
  if (window >= model.max_tokens) return OkStatus();
  return Unsupported(config, "sliding_window " + std::to_string(window) +
                                 " is shorter than the " +
                                 std::to_string(model.max_tokens) +
                                 " positions; windows are not supported");
}

// Dual chunk attention equals plain attention up to its first chunk boundary.
Status LimitToFirstChunk(const JsonObject& config, ModelConfig& model) {
  constexpr const char* kKey = "dual_chunk_attention_config";
  if (!config.Has(kKey)) return OkStatus();
  PBS_ASSIGN_OR_RETURN(const JsonObject chunks, config.Object(kKey));
  PBS_ASSIGN_OR_RETURN(const int64_t chunk, chunks.Int("chunk_size", 1, kPositionsMax));
  PBS_ASSIGN_OR_RETURN(const int64_t local, chunks.Int("local_size", 0, chunk - 1));
  PBS_ASSIGN_OR_RETURN(const int64_t original,
                       chunks.IntOr("original_max_position_embeddings", kPositionsMax,
                                    1, kPositionsMax));
  const int64_t plain = std::min(chunk - local, original);
  if (plain < model.max_tokens) {
    model.max_tokens = static_cast<int32_t>(plain);
    model.max_tokens_reason =
        " (its dual chunk attention, plain up to there, is not supported)";
  }
  return OkStatus();
}

Status ParsePositions(const JsonObject& config, ModelConfig& model) {
  PBS_ASSIGN_OR_RETURN(model.rope, ParseRopeConfig(config));
  PBS_ASSIGN_OR_RETURN(int64_t positions,
                       config.Int("max_position_embeddings", 1, kPositionsMax));
  if (model.rope.type == RopeType::kYarn) {
    // Folders often keep the original length here and leave the stretch to yarn.
    const double stretched =
        static_cast<double>(model.rope.original_max_position) * model.rope.factor;
    positions = std::max(positions, static_cast<int64_t>(stretched));
  }
  model.max_tokens = static_cast<int32_t>(std::min<int64_t>(positions, kSeqLenMax));
  PBS_RETURN_IF_ERROR(LimitToFirstChunk(config, model));
  return CheckSlidingWindow(config, model);
}

Status ParseEosTokens(const JsonObject& config, ModelConfig& model) {
  const nlohmann::json* value = config.Find("eos_token_id");
  if (value == nullptr) return OkStatus();
  const auto ids = value->is_array() ? *value : nlohmann::json::array({*value});
  if (static_cast<int64_t>(ids.size()) > kEosTokensMax) {
    return config.Error("eos_token_id has " + std::to_string(ids.size()) +
                        " entries, more than " + std::to_string(kEosTokensMax));
  }
  for (const nlohmann::json& id : ids) {
    if (!id.is_number_unsigned() ||
        id.get<uint64_t>() >= static_cast<uint64_t>(model.vocab_size)) {
      return config.Error("eos_token_id " + Quoted(id.dump()) +
                          " is not a token below vocab_size " +
                          std::to_string(model.vocab_size));
    }
    model.eos_token_ids.push_back(id.get<int32_t>());
  }
  return OkStatus();
}

}  // namespace

const char* ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return "llama";
    case Architecture::kMistral:
      return "mistral";
    case Architecture::kQwen2:
      return "qwen2";
    case Architecture::kQwen3:
      return "qwen3";
  }
  return "unknown";
}

StatusOr<ModelConfig> ParseModelConfig(std::string_view text) {
  PBS_ASSIGN_OR_RETURN(const nlohmann::json root,
                       ParseJson(text, kWhere, {.bytes_max = kConfigBytesMax}));
  if (!root.is_object()) return InvalidArgument("config.json: is not an object");
  const JsonObject config(root, std::string(kWhere) + ": ");
  ModelConfig model;
  PBS_ASSIGN_OR_RETURN(model.architecture, ParseArchitecture(config));
  PBS_RETURN_IF_ERROR(ParseSizes(config, model));
  PBS_RETURN_IF_ERROR(ParseVariants(config, model));
  PBS_RETURN_IF_ERROR(RefuseWhatChangesTheResult(config, model));
  PBS_RETURN_IF_ERROR(ParsePositions(config, model));
  PBS_RETURN_IF_ERROR(ParseEosTokens(config, model));
  return model;
}

std::string CanonicalArchitecture(const ModelConfig& config) {
  // %.17g: every double has one spelling, and it reads back to the same bits.
  char text[1024];
  const RopeConfig& rope = config.rope;
  const int length = std::snprintf(
      text, sizeof(text),
      "pbs-model-1 %s vocab=%d hidden=%d intermediate=%d layers=%d heads=%d "
      "kv_heads=%d "
      "head_dim=%d eps=%.9g tied=%d qkv_bias=%d output_bias=%d mlp_bias=%d qk_norm=%d "
      "rope=%s theta=%.17g factor=%.17g original=%lld low=%.17g high=%.17g "
      "beta_fast=%.17g beta_slow=%.17g truncate=%d attention_factor=%.17g",
      ArchitectureName(config.architecture), config.vocab_size, config.hidden_size,
      config.intermediate_size, config.num_layers, config.num_heads,
      config.num_kv_heads, config.head_dim,
      static_cast<double>(config.rms_norm_epsilon), config.tied_embeddings,
      config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm,
      RopeTypeName(rope.type), rope.theta, rope.factor,
      static_cast<long long>(rope.original_max_position), rope.low_freq_factor,
      rope.high_freq_factor, rope.beta_fast, rope.beta_slow, rope.truncate,
      rope.attention_factor);
  PBS_CHECK(length > 0 && length < static_cast<int>(sizeof(text)));
  return text;
}

}  // namespace pbs
