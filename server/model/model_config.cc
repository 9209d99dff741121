#include "server/model/model_config.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/model/json.h"

namespace pbs {
namespace {

constexpr const char* kWhere = "config.json";
constexpr const char* kGenerationWhere = "generation_config.json";

Status Unsupported(const JsonObject& config, const std::string& message) {
  return Unimplemented(config.Error(message).message());
}

// The object that describes the language model, and what is missing from it.
class Reader {
 public:
  Reader(const JsonObject& config, Architecture architecture,
         std::vector<std::string>& notes)
      : config_(config), architecture_(architecture), notes_(notes) {}

  const JsonObject& config() const { return config_; }
  Architecture architecture() const { return architecture_; }
  const ConfigDefaults& defaults() const { return DefaultsOf(architecture_); }
  std::vector<std::string>& notes() const { return notes_; }

  StatusOr<int32_t> Size(std::string_view key, int64_t fallback, int64_t high) const {
    if (!config_.Has(key)) NoteDefault(key, std::to_string(fallback));
    PBS_ASSIGN_OR_RETURN(const int64_t value, config_.IntOr(key, fallback, 1, high));
    return static_cast<int32_t>(value);
  }
  StatusOr<double> Number(std::string_view key, double fallback, double low,
                          double high) const {
    if (!config_.Has(key)) NoteDefault(key, NumberText(fallback));
    return config_.NumberOr(key, fallback, low, high);
  }
  void NoteDefault(std::string_view key, const std::string& value) const {
    notes_.push_back(config_
                         .Error(std::string(key) + " is missing; " + value +
                                " is used, the default of " +
                                ArchitectureName(architecture_))
                         .message());
  }

 private:
  const JsonObject& config_;
  const Architecture architecture_;
  std::vector<std::string>& notes_;
};

StatusOr<Architecture> ParseArchitecture(const JsonObject& config, bool is_text_part) {
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
  // A text part does not always name its class, or names it without a head.
  if (!is_text_part && config.Has("architectures")) {
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

// Null means as many KV heads as query heads to every class; a missing key means that
// to llama alone.
Status ParseKvHeads(const Reader& reader, ModelConfig& model) {
  constexpr std::string_view kKey = "num_key_value_heads";
  const bool is_null = reader.config().json().contains(kKey);
  const int32_t spoken = is_null ? 0 : reader.defaults().num_kv_heads;
  PBS_ASSIGN_OR_RETURN(
      model.num_kv_heads,
      reader.Size(kKey, spoken > 0 ? spoken : model.num_heads, model.num_heads));
  if (model.num_heads % model.num_kv_heads == 0) return OkStatus();
  return reader.config().Error("num_attention_heads " +
                               std::to_string(model.num_heads) +
                               " is not a multiple of num_key_value_heads " +
                               std::to_string(model.num_kv_heads));
}

Status ParseHeadDim(const Reader& reader, ModelConfig& model) {
  const JsonObject& config = reader.config();
  int32_t fallback = reader.defaults().head_dim;
  if (fallback > 0) {
    PBS_ASSIGN_OR_RETURN(model.head_dim,
                         reader.Size("head_dim", fallback, kHeadDims.back()));
  } else {
    if (!config.Has("head_dim") && model.hidden_size % model.num_heads != 0) {
      return config.Error("hidden_size " + std::to_string(model.hidden_size) +
                          " is not a multiple of num_attention_heads " +
                          std::to_string(model.num_heads) +
                          ", and head_dim is missing");
    }
    fallback = model.hidden_size / model.num_heads;
    PBS_ASSIGN_OR_RETURN(const int64_t head_dim,
                         config.IntOr("head_dim", fallback, 1, kHeadDims.back()));
    model.head_dim = static_cast<int32_t>(head_dim);
  }
  if (std::count(kHeadDims.begin(), kHeadDims.end(), model.head_dim) > 0) {
    return OkStatus();
  }
  return Unsupported(config, "head_dim " + std::to_string(model.head_dim) +
                                 " is not one of " + HeadDimsText());
}

Status ParseSizes(const Reader& reader, ModelConfig& model) {
  const ConfigDefaults& defaults = reader.defaults();
  PBS_ASSIGN_OR_RETURN(model.vocab_size,
                       reader.Size("vocab_size", defaults.vocab_size, kVocabSizeMax));
  PBS_ASSIGN_OR_RETURN(
      model.hidden_size,
      reader.Size("hidden_size", defaults.hidden_size, kHiddenSizeMax));
  PBS_ASSIGN_OR_RETURN(model.intermediate_size,
                       reader.Size("intermediate_size", defaults.intermediate_size,
                                   kIntermediateSizeMax));
  PBS_ASSIGN_OR_RETURN(model.num_layers, reader.Size("num_hidden_layers",
                                                     defaults.num_layers, kLayersMax));
  PBS_ASSIGN_OR_RETURN(
      const double epsilon,
      reader.Number("rms_norm_eps", defaults.rms_norm_epsilon, 1e-12, 1e-1));
  model.rms_norm_epsilon = static_cast<float>(epsilon);
  PBS_ASSIGN_OR_RETURN(model.num_heads, reader.Size("num_attention_heads",
                                                    defaults.num_heads, kNumHeadsMax));
  PBS_RETURN_IF_ERROR(ParseKvHeads(reader, model));
  return ParseHeadDim(reader, model);
}

// Which parts have biases follows from the architecture, and for some from the config.
Status ParseVariants(const JsonObject& root, const Reader& reader, ModelConfig& model) {
  const JsonObject& config = reader.config();
  const Architecture architecture = model.architecture;
  constexpr std::string_view kTied = "tie_word_embeddings";
  if (!root.Has(kTied) && !config.Has(kTied)) reader.NoteDefault(kTied, "false");
  PBS_ASSIGN_OR_RETURN(const bool tied_root, root.BoolOr(kTied, false));
  PBS_ASSIGN_OR_RETURN(model.tied_embeddings, config.BoolOr(kTied, tied_root));
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
    if (type != "full_attention" && type != "sliding_attention") {
      return Unsupported(config, "layer_types holds " + Quoted(type.dump()) +
                                     "; only full_attention is supported, and "
                                     "sliding_attention up to its window");
    }
  }
  return OkStatus();
}

// A part of a folder with more parts may have its settings at the root.
Status ParseFp8(const JsonObject& root, const JsonObject& config, ModelConfig& model) {
  for (const JsonObject* object : {&root, &config}) {
    if (object->Has("compression_config")) {
      return Unsupported(*object,
                         "compression_config is not supported; write the "
                         "folder with a later llm-compressor");
    }
    if (!object->Has("quantization_config")) continue;
    PBS_ASSIGN_OR_RETURN(const JsonObject quantization,
                         object->Object("quantization_config"));
    PBS_ASSIGN_OR_RETURN(model.fp8, ParseQuantization(quantization));
  }
  return OkStatus();
}

// Serves up to `limit` tokens, behind which `feature` would set in.
void LimitTokens(int64_t limit, const char* feature, ModelConfig& model) {
  if (limit >= model.max_tokens) return;
  model.max_tokens = static_cast<int32_t>(limit);
  model.max_tokens_reason = std::string(" (its ") + feature +
                            ", plain attention up to there, is not supported)";
}

// True when some layer sees only a window of the past.
StatusOr<bool> HasSlidingLayers(const Reader& reader, const ModelConfig& model) {
  const JsonObject& config = reader.config();
  if (config.Has("layer_types")) {
    PBS_ASSIGN_OR_RETURN(const nlohmann::json* types, config.Array("layer_types"));
    return std::count(types->begin(), types->end(), "sliding_attention") > 0;
  }
  if (reader.architecture() != Architecture::kQwen2 &&
      reader.architecture() != Architecture::kQwen3) {
    return true;
  }
  PBS_ASSIGN_OR_RETURN(const bool used, config.BoolOr("use_sliding_window", false));
  if (!used) return false;
  PBS_ASSIGN_OR_RETURN(const int64_t full_layers,
                       config.IntOr("max_window_layers",
                                    reader.defaults().full_layers_min, 0, INT32_MAX));
  return full_layers < model.num_layers;
}

// Attention is plain as long as all of the past is in the window.
Status LimitToWindow(const Reader& reader, ModelConfig& model) {
  constexpr std::string_view kKey = "sliding_window";
  const JsonObject& config = reader.config();
  PBS_ASSIGN_OR_RETURN(const bool slides, HasSlidingLayers(reader, model));
  if (!slides) return OkStatus();
  const bool is_null = config.json().contains(kKey) && !config.Has(kKey);
  const int32_t fallback = is_null ? 0 : reader.defaults().sliding_window;
  if (!config.Has(kKey) && fallback == 0) return OkStatus();
  PBS_ASSIGN_OR_RETURN(const int32_t window, reader.Size(kKey, fallback, INT32_MAX));
  LimitTokens(window, "sliding window", model);
  return OkStatus();
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
  LimitTokens(std::min(chunk - local, original), "dual chunk attention", model);
  return OkStatus();
}

Status ParsePositions(const Reader& reader, const RopeOptions& options,
                      ModelConfig& model) {
  PBS_ASSIGN_OR_RETURN(int64_t positions,
                       reader.Size("max_position_embeddings",
                                   reader.defaults().max_position, kPositionsMax));
  const RopeContext context = {reader.defaults().rope_theta, positions, options};
  PBS_ASSIGN_OR_RETURN(model.rope,
                       ParseRopeConfig(reader.config(), context, model.notes));
  if (model.rope.type == RopeType::kYarn) {
    // Folders often keep the original length here and leave the stretch to yarn.
    const double stretched =
        static_cast<double>(model.rope.original_max_position) * model.rope.factor;
    positions = std::max(positions, static_cast<int64_t>(stretched));
  }
  model.max_tokens = static_cast<int32_t>(std::min<int64_t>(positions, kSeqLenMax));
  PBS_RETURN_IF_ERROR(LimitToFirstChunk(reader.config(), model));
  PBS_RETURN_IF_ERROR(LimitToWindow(reader, model));
  if (!model.max_tokens_reason.empty()) {
    model.notes.push_back(reader.config()
                              .Error("prompt and answer may have " +
                                     std::to_string(model.max_tokens) +
                                     " tokens together" + model.max_tokens_reason)
                              .message());
  }
  return OkStatus();
}

// Appends the end tokens of `config` that are not there yet.
Status AddEosTokens(const JsonObject& config, ModelConfig& model) {
  const nlohmann::json* value = config.Find("eos_token_id");
  if (value == nullptr) return OkStatus();
  const auto ids = value->is_array() ? *value : nlohmann::json::array({*value});
  std::vector<int32_t> tokens = model.eos_token_ids;
  for (const nlohmann::json& id : ids) {
    if (!id.is_number_unsigned() ||
        id.get<uint64_t>() >= static_cast<uint64_t>(model.vocab_size)) {
      return config.Error("eos_token_id " + Quoted(id.dump()) +
                          " is not a token below vocab_size " +
                          std::to_string(model.vocab_size));
    }
    const auto token = id.get<int32_t>();
    if (std::find(tokens.begin(), tokens.end(), token) == tokens.end()) {
      tokens.push_back(token);
    }
    if (tokens.size() > kEosTokensMax) {
      return config.Error("eos_token_id makes " + std::to_string(tokens.size()) +
                          " end tokens, more than " + std::to_string(kEosTokensMax));
    }
  }
  model.eos_token_ids = std::move(tokens);
  return OkStatus();
}

Status ParseLanguageModel(const JsonObject& root, const JsonObject& config,
                          const RopeOptions& rope, ModelConfig& model) {
  PBS_ASSIGN_OR_RETURN(model.architecture,
                       ParseArchitecture(config, model.is_text_part));
  const Reader reader(config, model.architecture, model.notes);
  PBS_RETURN_IF_ERROR(ParseSizes(reader, model));
  PBS_RETURN_IF_ERROR(ParseVariants(root, reader, model));
  PBS_RETURN_IF_ERROR(RefuseWhatChangesTheResult(config, model));
  PBS_RETURN_IF_ERROR(ParseFp8(root, config, model));
  PBS_RETURN_IF_ERROR(ParsePositions(reader, rope, model));
  return AddEosTokens(config, model);
}

}  // namespace

StatusOr<ModelConfig> ParseModelConfig(std::string_view text, const RopeOptions& rope) {
  PBS_ASSIGN_OR_RETURN(const nlohmann::json json,
                       ParseJson(text, kWhere, {.bytes_max = kConfigBytesMax}));
  if (!json.is_object()) return InvalidArgument("config.json: is not an object");
  const JsonObject root(json, std::string(kWhere) + ": ");
  ModelConfig model;
  if (!root.Has("text_config")) {
    PBS_RETURN_IF_ERROR(ParseLanguageModel(root, root, rope, model));
    return model;
  }
  PBS_ASSIGN_OR_RETURN(const JsonObject config, root.Object("text_config"));
  model.is_text_part = true;
  PBS_RETURN_IF_ERROR(ParseLanguageModel(root, config, rope, model));
  return model;
}

Status AddGenerationConfig(std::string_view text, ModelConfig& config) {
  PBS_ASSIGN_OR_RETURN(
      const nlohmann::json json,
      ParseJson(text, kGenerationWhere, {.bytes_max = kConfigBytesMax}));
  if (!json.is_object()) {
    return InvalidArgument(std::string(kGenerationWhere) + ": is not an object");
  }
  return AddEosTokens(JsonObject(json, std::string(kGenerationWhere) + ": "), config);
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
  if (config.fp8.block_rows == 0) return text;
  return std::string(text) + " fp8_blocks=" + std::to_string(config.fp8.block_rows) +
         "x" + std::to_string(config.fp8.block_cols);
}

}  // namespace pbs
