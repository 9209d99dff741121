// config.json of a Hugging Face model folder, checked.
//
// Served: llama, mistral, qwen2 (2.5), qwen3. What would change the result and is not
// implemented - sliding windows, quantisation, partial or length-dependent rotation -
// is refused with the reason, and so is a missing key whose default differs between
// readers. Keys that do not touch inference are ignored.
//
// Threading: pure functions and values.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "pbs/limits.h"
#include "pbs/status.h"
#include "server/model/rope_config.h"

namespace pbs {

inline constexpr int64_t kConfigBytesMax = 1 << 20;
inline constexpr int32_t kLayersMax = 1024;
inline constexpr int32_t kHiddenSizeMax = 65'536;
inline constexpr int32_t kIntermediateSizeMax = 1 << 20;
inline constexpr int32_t kVocabSizeMax = 1 << 21;
inline constexpr int32_t kPositionsMax = 1 << 30;  // prompts stop at kSeqLenMax anyway
inline constexpr int32_t kEosTokensMax = 64;

enum class Architecture : uint8_t { kLlama, kMistral, kQwen2, kQwen3 };

// "llama", "mistral", "qwen2", "qwen3".
const char* ArchitectureName(Architecture architecture);

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
  bool output_bias = false;  // of the attention's output projection
  bool mlp_bias = false;
  bool qk_norm = false;
  RopeConfig rope;
  // Longest sequence, prompt and answer together, that this model is served for: its
  // positions, or less where dual chunk attention would set in.
  int32_t max_tokens = 0;
  // Why max_tokens is less than the config's positions, to follow it in a refusal:
  // empty, or " (...)".
  std::string max_tokens_reason;
  std::vector<int32_t> eos_token_ids;

  int32_t qkv_features() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int32_t attention_features() const { return num_heads * head_dim; }
};

// InvalidArgument names key, value and limit; Unimplemented gives the reason why a
// feature is refused.
StatusOr<ModelConfig> ParseModelConfig(std::string_view text);

// Everything in the config that the result depends on, in one line with a fixed form:
// the first part of the model digest.
std::string CanonicalArchitecture(const ModelConfig& config);

}  // namespace pbs
