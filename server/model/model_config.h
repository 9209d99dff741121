// config.json and generation_config.json of a Hugging Face model folder, checked.
//
// Served: llama, mistral, qwen2 (2.5), qwen3, alone or as the text part of a model with
// more parts (text_config). A missing key has the default of its architecture
// (config_defaults.h). Unimplemented settings that would change the result - partial or
// length-dependent rotation, most quantisations - are refused with the reason. A
// sliding window or dual chunk attention limits the length of prompts. Keys without
// effect on inference are ignored.
//
// Threading: pure functions and values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "pbs/limits.h"
#include "pbs/status.h"
#include "server/model/config_defaults.h"
#include "server/model/fp8.h"
#include "server/model/rope_config.h"

namespace pbs {

inline constexpr int64_t kConfigBytesMax = 1 << 20;
inline constexpr int32_t kLayersMax = 1024;
inline constexpr int32_t kHiddenSizeMax = 65'536;
inline constexpr int32_t kIntermediateSizeMax = 1 << 20;
inline constexpr int32_t kVocabSizeMax = 1 << 21;
inline constexpr int32_t kPositionsMax = 1 << 30;  // prompts stop at kSeqLenMax anyway
inline constexpr int32_t kEosTokensMax = 64;       // in both files together

struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float rms_norm_epsilon = 0;
  bool tied_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;  // bias of the attention's output projection
  bool mlp_bias = false;
  bool qk_norm = false;
  RopeConfig rope;
  // The longest sequence, prompt and answer together, that is served: the model's
  // positions, or less where a sliding window or dual chunk attention would begin.
  int32_t max_tokens = 0;
  // Text to append to max_tokens in an error: " (...)", the reason why it is less than
  // the config's positions, or empty.
  std::string max_tokens_reason;
  std::vector<int32_t> eos_token_ids;  // of both files, each once
  Fp8Format fp8;                       // of weights that are stored as E4M3
  // The model is the text part of a model with several parts; see
  // Checkpoint::KeepTextPart.
  bool is_text_part = false;
  // Facts about reading the files that an operator should know: defaults that were
  // used, settings without effect. Each is a sentence that names the file.
  std::vector<std::string> notes;

  int32_t qkv_features() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int32_t attention_features() const { return num_heads * head_dim; }
};

// InvalidArgument names key, value and limit; Unimplemented states why a feature is
// refused.
StatusOr<ModelConfig> ParseModelConfig(std::string_view text,
                                       const RopeOptions& rope = {});

// Adds the end tokens of generation_config.json: generation ends at the tokens of
// either file. InvalidArgument names key, value and limit; `config` is then unchanged.
Status AddGenerationConfig(std::string_view text, ModelConfig& config);

// All settings that the result depends on, in one line of a fixed form, which is the
// first part of the model digest.
std::string CanonicalArchitecture(const ModelConfig& config);

}  // namespace pbs
