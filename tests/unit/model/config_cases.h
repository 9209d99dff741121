// Configs for table tests, and the checks of a changed config.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>

#include "server/model/model_config.h"

namespace pbs::config_cases {

using nlohmann::json;

inline json Llama() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"vocab_size", 1000},
          {"hidden_size", 256},
          {"intermediate_size", 512},
          {"num_hidden_layers", 4},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 2},
          {"hidden_act", "silu"},
          {"rms_norm_eps", 1e-5},
          {"max_position_embeddings", 4096},
          {"rope_theta", 10000.0},
          {"tie_word_embeddings", false},
          {"eos_token_id", 2}};
}

inline json Qwen2() {
  json config = Llama();
  config["architectures"] = {"Qwen2ForCausalLM"};
  config["model_type"] = "qwen2";
  return config;
}

inline json Qwen3() {
  json config = Llama();
  config["architectures"] = {"Qwen3ForCausalLM"};
  config["model_type"] = "qwen3";
  config["head_dim"] = 128;
  return config;
}

inline json Mistral() {
  json config = Llama();
  config["architectures"] = {"MistralForCausalLM"};
  config["model_type"] = "mistral";
  config["sliding_window"] = nullptr;
  return config;
}

// A folder of a vision-language model around a llama.
inline json WithVision() {
  json text = Llama();
  text.erase("architectures");
  return {{"architectures", {"LlavaForConditionalGeneration"}},
          {"model_type", "llava"},
          {"text_config", text},
          {"vision_config", {{"hidden_size", 32}}}};
}

inline json Llama3Rope() {
  return {{"rope_type", "llama3"},
          {"factor", 8.0},
          {"low_freq_factor", 1.0},
          {"high_freq_factor", 4.0},
          {"original_max_position_embeddings", 1024}};
}

inline json YarnRope() {
  return {{"rope_type", "yarn"},
          {"factor", 4.0},
          {"original_max_position_embeddings", 2048}};
}

struct RefusedCase {
  const char* name;
  json (*base)();
  std::function<void(json&)> change;
  StatusCode code;
  const char* message;  // after "config.json: "
};

inline void PrintTo(const RefusedCase& c, std::ostream* out) { *out << c.name; }

inline constexpr StatusCode kInvalid = StatusCode::kInvalidArgument;
inline constexpr StatusCode kUnsupported = StatusCode::kUnimplemented;

struct AcceptedCase {
  const char* name;
  json (*base)();
  std::function<void(json&)> change;
  std::function<bool(const ModelConfig&)> holds;
};

inline void PrintTo(const AcceptedCase& c, std::ostream* out) { *out << c.name; }

// Changes a config, which must then be refused with the case's message.
inline void ExpectRefused(const RefusedCase& c) {
  json config = c.base();
  c.change(config);
  const auto parsed = ParseModelConfig(config.dump());
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.status().message(), std::string("config.json: ") + c.message);
  EXPECT_EQ(parsed.status().code(), c.code);
}

// Changes a config, which must then be accepted with the case's meaning.
inline void ExpectAccepted(const AcceptedCase& c) {
  json config = c.base();
  c.change(config);
  const auto parsed = ParseModelConfig(config.dump());
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_TRUE(c.holds(*parsed)) << CanonicalArchitecture(*parsed);
}

}  // namespace pbs::config_cases
