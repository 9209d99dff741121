// Defaults of transformers for keys that config.json leaves out, per architecture.
//
// Published folders lack keys that were introduced after them: Llama 2 has no
// rope_theta. The values are the documented defaults of LlamaConfig, MistralConfig,
// Qwen2Config and Qwen3Config (transformers 5); tests/python/test_config_defaults.py
// compares them with an installed transformers.
//
// Threading: constants.
#pragma once

#include <cstdint>

namespace pbs {

enum class Architecture : uint8_t { kLlama, kMistral, kQwen2, kQwen3 };

// "llama", "mistral", "qwen2", "qwen3".
const char* ArchitectureName(Architecture architecture);

struct ConfigDefaults {
  int32_t vocab_size;
  int32_t hidden_size;
  int32_t intermediate_size;
  int32_t num_layers;
  int32_t num_heads;
  int32_t num_kv_heads;  // 0: as many as query heads
  int32_t head_dim;      // 0: hidden_size / num_heads
  double rms_norm_epsilon;
  int32_t max_position;
  double rope_theta;
  int32_t sliding_window;   // 0: none
  int32_t full_layers_min;  // max_window_layers: the layers before it never slide
};

const ConfigDefaults& DefaultsOf(Architecture architecture);

}  // namespace pbs
