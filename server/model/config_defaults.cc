#include "server/model/config_defaults.h"

namespace pbs {
namespace {

constexpr ConfigDefaults kLlama = {.vocab_size = 32'000,
                                   .hidden_size = 4096,
                                   .intermediate_size = 11'008,
                                   .num_layers = 32,
                                   .num_heads = 32,
                                   .num_kv_heads = 0,
                                   .head_dim = 0,
                                   .rms_norm_epsilon = 1e-6,
                                   .max_position = 2048,
                                   .rope_theta = 10'000,
                                   .sliding_window = 0,
                                   .full_layers_min = 0};
constexpr ConfigDefaults kMistral = {.vocab_size = 32'000,
                                     .hidden_size = 4096,
                                     .intermediate_size = 14'336,
                                     .num_layers = 32,
                                     .num_heads = 32,
                                     .num_kv_heads = 8,
                                     .head_dim = 0,
                                     .rms_norm_epsilon = 1e-6,
                                     .max_position = 131'072,
                                     .rope_theta = 10'000,
                                     .sliding_window = 4096,
                                     .full_layers_min = 0};
constexpr ConfigDefaults kQwen2 = {.vocab_size = 151'936,
                                   .hidden_size = 4096,
                                   .intermediate_size = 22'016,
                                   .num_layers = 32,
                                   .num_heads = 32,
                                   .num_kv_heads = 32,
                                   .head_dim = 0,
                                   .rms_norm_epsilon = 1e-6,
                                   .max_position = 32'768,
                                   .rope_theta = 10'000,
                                   .sliding_window = 4096,
                                   .full_layers_min = 28};
constexpr ConfigDefaults kQwen3 = {.vocab_size = 151'936,
                                   .hidden_size = 4096,
                                   .intermediate_size = 22'016,
                                   .num_layers = 32,
                                   .num_heads = 32,
                                   .num_kv_heads = 32,
                                   .head_dim = 128,
                                   .rms_norm_epsilon = 1e-6,
                                   .max_position = 32'768,
                                   .rope_theta = 10'000,
                                   .sliding_window = 4096,
                                   .full_layers_min = 28};

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

const ConfigDefaults& DefaultsOf(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return kLlama;
    case Architecture::kMistral:
      return kMistral;
    case Architecture::kQwen2:
      return kQwen2;
    case Architecture::kQwen3:
      return kQwen3;
  }
  return kLlama;
}

}  // namespace pbs
