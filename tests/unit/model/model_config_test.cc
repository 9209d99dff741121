// Spec: server/model/model_config.h.
#include "server/model/model_config.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <ostream>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/unit/model/config_cases.h"

namespace pbs {
namespace {

using namespace config_cases;  // NOLINT: the tables below read as prose

class RefusedConfigSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedConfigSpec, NamesKeyValueAndLimit) { ExpectRefused(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    Sizes, RefusedConfigSpec,
    testing::Values(
        RefusedCase{"vocab_zero", Llama, [](json& c) { c["vocab_size"] = 0; }, kInvalid,
                    "vocab_size 0 is outside [1, 2097152]"},
        RefusedCase{"layers_absurd", Llama,
                    [](json& c) { c["num_hidden_layers"] = 1'000'000'000; }, kInvalid,
                    "num_hidden_layers 1000000000 is outside [1, 1024]"},
        RefusedCase{"layers_negative", Llama,
                    [](json& c) { c["num_hidden_layers"] = -1; }, kInvalid,
                    "num_hidden_layers -1 is outside [1, 1024]"},
        RefusedCase{"layers_beyond_64_bits", Llama,
                    [](json& c) { c["num_hidden_layers"] = UINT64_MAX; }, kInvalid,
                    "num_hidden_layers 18446744073709551615 is outside [1, 1024]"},
        RefusedCase{"hidden_fraction", Llama, [](json& c) { c["hidden_size"] = 256.5; },
                    kInvalid, "hidden_size is of type number, not an integer"},
        RefusedCase{"hidden_string", Llama, [](json& c) { c["hidden_size"] = "256"; },
                    kInvalid, "hidden_size is of type string, not an integer"},
        RefusedCase{"hidden_past_the_limit", Llama,
                    [](json& c) { c["hidden_size"] = 65537; }, kInvalid,
                    "hidden_size 65537 is outside [1, 65536]"},
        RefusedCase{"epsilon_zero", Llama, [](json& c) { c["rms_norm_eps"] = 0; },
                    kInvalid, "rms_norm_eps 0 is outside [1e-12, 0.1]"},
        RefusedCase{"heads_past_the_limit", Llama,
                    [](json& c) { c["num_attention_heads"] = 1025; }, kInvalid,
                    "num_attention_heads 1025 is outside [1, 1024]"},
        RefusedCase{"kv_heads_do_not_divide", Llama,
                    [](json& c) { c["num_key_value_heads"] = 3; }, kInvalid,
                    "num_attention_heads 8 is not a multiple of num_key_value_heads 3"},
        RefusedCase{"more_kv_heads_than_heads", Llama,
                    [](json& c) { c["num_key_value_heads"] = 16; }, kInvalid,
                    "num_key_value_heads 16 is outside [1, 8]"},
        RefusedCase{"head_dim_zero", Llama, [](json& c) { c["head_dim"] = 0; },
                    kInvalid, "head_dim 0 is outside [1, 256]"},
        RefusedCase{"head_dim_without_a_kernel", Llama,
                    [](json& c) { c["head_dim"] = 80; }, kUnsupported,
                    "head_dim 80 is not one of 32, 64, 96, 128, 256"},
        RefusedCase{"hidden_not_a_multiple", Llama,
                    [](json& c) { c["hidden_size"] = 250; }, kInvalid,
                    "hidden_size 250 is not a multiple of num_attention_heads 8, and "
                    "head_dim is missing"},
        RefusedCase{"eos_outside_the_vocabulary", Llama,
                    [](json& c) {
                      c["eos_token_id"] = {2, 1000};
                    },
                    kInvalid,
                    "eos_token_id \"1000\" is not a token below vocab_size 1000"},
        RefusedCase{"eos_string", Llama, [](json& c) { c["eos_token_id"] = "x"; },
                    kInvalid,
                    "eos_token_id \"\"x\"\" is not a token below vocab_size 1000"}),
    testing_support::CaseName());

INSTANTIATE_TEST_SUITE_P(
    Features, RefusedConfigSpec,
    testing::Values(
        RefusedCase{"type_missing", Llama, [](json& c) { c.erase("model_type"); },
                    kInvalid, "model_type is missing"},
        RefusedCase{"type_unknown", Llama, [](json& c) { c["model_type"] = "gemma3"; },
                    kUnsupported,
                    "model_type \"gemma3\" is not one of llama, mistral, qwen2, qwen3"},
        RefusedCase{
            "no_language_model_head", Llama,
            [](json& c) { c["architectures"] = {"LlamaForSequenceClassification"}; },
            kUnsupported,
            "architectures holds \"\"LlamaForSequenceClassification\"\"; "
            "model_type llama is served as LlamaForCausalLM"},
        RefusedCase{"activation", Llama, [](json& c) { c["hidden_act"] = "gelu"; },
                    kUnsupported, "hidden_act \"gelu\" is not supported, only silu"},
        RefusedCase{"partial_rotation", Llama,
                    [](json& c) { c["partial_rotary_factor"] = 0.5; }, kUnsupported,
                    "partial_rotary_factor 0.5 is not supported, only 1"},
        RefusedCase{"mrope", Qwen2, [](json& c) { c["use_mrope"] = true; },
                    kUnsupported, "use_mrope true is not supported"},
        RefusedCase{"mistral_attention_bias", Mistral,
                    [](json& c) { c["attention_bias"] = true; }, kUnsupported,
                    "attention_bias true is unknown for mistral"},
        RefusedCase{"qwen_mlp_bias", Qwen2, [](json& c) { c["mlp_bias"] = true; },
                    kUnsupported, "mlp_bias true is unknown for qwen2"},
        RefusedCase{"tied_not_boolean", Llama,
                    [](json& c) { c["tie_word_embeddings"] = 1; }, kInvalid,
                    "tie_word_embeddings is of type number, not a boolean"},
        RefusedCase{
            "layer_types_of_another_kind", Qwen2,
            [](json& c) {
              c["layer_types"] = {"full_attention", "full_attention",
                                  "linear_attention", "full_attention"};
            },
            kUnsupported,
            "layer_types holds \"\"linear_attention\"\"; only full_attention is "
            "supported, and sliding_attention up to its window"},
        RefusedCase{"text_part_unknown", WithVision,
                    [](json& c) { c["text_config"]["model_type"] = "gemma3_text"; },
                    kUnsupported,
                    "text_config: model_type \"gemma3_text\" is not one of llama, "
                    "mistral, qwen2, qwen3"},
        RefusedCase{"text_part_no_object", WithVision,
                    [](json& c) { c["text_config"] = "llama"; }, kInvalid,
                    "text_config is of type string, not an object"},
        RefusedCase{"layer_types_too_few", Qwen2,
                    [](json& c) { c["layer_types"] = {"full_attention"}; }, kInvalid,
                    "layer_types has 1 entries for 4 layers"},
        RefusedCase{"dual_chunk_without_size", Qwen2,
                    [](json& c) {
                      c["dual_chunk_attention_config"] = {{"local_size", 8}};
                    },
                    kInvalid, "dual_chunk_attention_config: chunk_size is missing"},
        RefusedCase{
            "dual_chunk_local_beyond_chunk", Qwen2,
            [](json& c) {
              c["dual_chunk_attention_config"] = {{"chunk_size", 1024},
                                                  {"local_size", 1024}};
            },
            kInvalid,
            "dual_chunk_attention_config: local_size 1024 is outside [0, 1023]"}),
    testing_support::CaseName());

struct TextCase {
  const char* name;
  std::string text;
  const char* message;
};

void PrintTo(const TextCase& c, std::ostream* out) { *out << c.name; }

class ConfigTextSpec : public testing::TestWithParam<TextCase> {};

TEST_P(ConfigTextSpec, RefusesTextThatIsNoSoundJson) {
  const auto parsed = ParseModelConfig(GetParam().text);
  EXPECT_EQ(parsed.status().message(), GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ConfigTextSpec,
    testing::Values(TextCase{"empty", "", "config.json: is not valid JSON near byte 1"},
                    TextCase{"cut_off", "{\"vocab_size\": ",
                             "config.json: is not valid JSON near byte 16"},
                    TextCase{"an_array", "[1]", "config.json: is not an object"},
                    TextCase{"bad_utf8", "{\"\xff\": 1}",
                             "config.json: is not valid JSON near byte 3"},
                    TextCase{"text_behind_a_nul", std::string("{}\0{\"a\": 1}", 11),
                             "config.json: is not valid JSON near byte 3"},
                    TextCase{"infinite", "{\"rope_theta\": 1e999}",
                             "config.json: is not valid JSON near byte 20"},
                    TextCase{"repeated_key", "{\"vocab_size\": 1, \"vocab_size\": 2}",
                             "config.json: key \"vocab_size\" appears twice"},
                    TextCase{"repeated_inside",
                             "{\"rope_scaling\": {\"a\": 1, \"a\": 1}}",
                             "config.json: key \"a\" appears twice"},
                    TextCase{"deep", std::string(100'000, '['),
                             "config.json: is nested deeper than 16"},
                    TextCase{"huge", std::string((1 << 20) + 1, ' '),
                             "config.json: 1048577 bytes of JSON exceed 1048576"}),
    testing_support::CaseName());

class AcceptedConfigSpec : public testing::TestWithParam<AcceptedCase> {};

TEST_P(AcceptedConfigSpec, MeansWhatHuggingFaceMeans) { ExpectAccepted(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    Cases, AcceptedConfigSpec,
    testing::Values(
        AcceptedCase{"llama", Llama, [](json&) {},
                     [](const ModelConfig& m) {
                       return m.head_dim == 32 && m.num_kv_heads == 2 && !m.qkv_bias &&
                              !m.output_bias && !m.qk_norm && !m.tied_embeddings &&
                              m.max_tokens == 4096 && m.rope.theta == 10000 &&
                              m.qkv_features() == 12 * 32;
                     }},
        AcceptedCase{"llama_biases", Llama,
                     [](json& c) {
                       c["attention_bias"] = true;
                       c["mlp_bias"] = true;
                     },
                     [](const ModelConfig& m) {
                       return m.qkv_bias && m.output_bias && m.mlp_bias;
                     }},
        AcceptedCase{"llama_kv_heads_default_to_heads", Llama,
                     [](json& c) { c.erase("num_key_value_heads"); },
                     [](const ModelConfig& m) { return m.num_kv_heads == 8; }},
        AcceptedCase{"null_is_absent", Qwen2,
                     [](json& c) {
                       c["num_key_value_heads"] = nullptr;
                       c["head_dim"] = nullptr;
                       c["rope_scaling"] = nullptr;
                     },
                     [](const ModelConfig& m) {
                       return m.num_kv_heads == 8 && m.head_dim == 32;
                     }},
        AcceptedCase{"head_dim_differs_from_hidden_over_heads", Llama,
                     [](json& c) { c["head_dim"] = 128; },
                     [](const ModelConfig& m) {
                       return m.attention_features() == 1024 && m.hidden_size == 256;
                     }},
        AcceptedCase{"qwen2_has_qkv_biases_only", Qwen2, [](json&) {},
                     [](const ModelConfig& m) {
                       return m.qkv_bias && !m.output_bias && !m.qk_norm;
                     }},
        AcceptedCase{"qwen3_has_qk_norms", Qwen3, [](json&) {},
                     [](const ModelConfig& m) {
                       return !m.qkv_bias && m.qk_norm && m.head_dim == 128;
                     }},
        AcceptedCase{"mistral", Mistral, [](json&) {},
                     [](const ModelConfig& m) { return !m.qkv_bias; }},
        AcceptedCase{"tied", Llama, [](json& c) { c["tie_word_embeddings"] = true; },
                     [](const ModelConfig& m) { return m.tied_embeddings; }},
        AcceptedCase{"eos_list", Llama,
                     [](json& c) {
                       c["eos_token_id"] = {2, 7};
                     },
                     [](const ModelConfig& m) {
                       return m.eos_token_ids == std::vector<int32_t>{2, 7};
                     }},
        AcceptedCase{"no_eos", Llama, [](json& c) { c.erase("eos_token_id"); },
                     [](const ModelConfig& m) { return m.eos_token_ids.empty(); }},
        AcceptedCase{"window_as_long_as_the_positions", Mistral,
                     [](json& c) { c["sliding_window"] = 4096; },
                     [](const ModelConfig& m) { return m.max_tokens == 4096; }},
        AcceptedCase{"window_not_used", Qwen2,
                     [](json& c) {
                       c["sliding_window"] = 16;
                       c["use_sliding_window"] = false;
                     },
                     [](const ModelConfig& m) { return m.max_tokens == 4096; }},
        AcceptedCase{"window_above_the_last_layer", Qwen2,
                     [](json& c) {
                       c["sliding_window"] = 16;
                       c["use_sliding_window"] = true;
                       c["max_window_layers"] = 4;
                     },
                     [](const ModelConfig& m) { return m.max_tokens == 4096; }},
        AcceptedCase{"mistral_window_limits_the_prompt", Mistral,
                     [](json& c) { c["sliding_window"] = 1024; },
                     [](const ModelConfig& m) {
                       return m.max_tokens == 1024 &&
                              m.max_tokens_reason ==
                                  " (its sliding window, plain attention up to there, "
                                  "is not supported)" &&
                              m.notes == std::vector<std::string>{
                                             "config.json: prompt and answer may have "
                                             "1024 tokens together" +
                                             m.max_tokens_reason};
                     }},
        AcceptedCase{"mistral_window_left_out_is_4096", Mistral,
                     [](json& c) {
                       c.erase("sliding_window");
                       c["max_position_embeddings"] = 32'768;
                     },
                     [](const ModelConfig& m) { return m.max_tokens == 4096; }},
        AcceptedCase{"llama_window_limits_the_prompt", Llama,
                     [](json& c) { c["sliding_window"] = 16; },
                     [](const ModelConfig& m) { return m.max_tokens == 16; }},
        AcceptedCase{"qwen_window_of_the_upper_layers", Qwen2,
                     [](json& c) {
                       c["use_sliding_window"] = true;
                       c["sliding_window"] = 2048;
                       c["max_window_layers"] = 2;
                     },
                     [](const ModelConfig& m) { return m.max_tokens == 2048; }},
        AcceptedCase{"sliding_layer_types", Qwen3,
                     [](json& c) {
                       c["layer_types"] = {"full_attention", "full_attention",
                                           "sliding_attention", "full_attention"};
                       c["sliding_window"] = 512;
                     },
                     [](const ModelConfig& m) { return m.max_tokens == 512; }},
        AcceptedCase{"text_part_of_a_model_with_vision", WithVision, [](json&) {},
                     [](const ModelConfig& m) {
                       return m.is_text_part &&
                              m.architecture == Architecture::kLlama &&
                              m.num_layers == 4 && m.notes.empty();
                     }},
        AcceptedCase{"text_part_tied_at_the_root", WithVision,
                     [](json& c) {
                       c["text_config"].erase("tie_word_embeddings");
                       c["tie_word_embeddings"] = true;
                     },
                     [](const ModelConfig& m) { return m.tied_embeddings; }},
        AcceptedCase{"text_part_speaks_before_the_root", WithVision,
                     [](json& c) {
                       c["tie_word_embeddings"] = true;
                       c["text_config"]["tie_word_embeddings"] = false;
                     },
                     [](const ModelConfig& m) { return !m.tied_embeddings; }},
        AcceptedCase{
            "llama_2", Llama,
            [](json& c) {
              c.erase("rope_theta");
              c.erase("num_key_value_heads");
              c.erase("rms_norm_eps");
              c.erase("max_position_embeddings");
            },
            [](const ModelConfig& m) {
              return m.rope.theta == 10000 && m.num_kv_heads == 8 &&
                     m.rms_norm_epsilon == 1e-6f && m.max_tokens == 2048 &&
                     m.notes == std::vector<std::string>{
                                    "config.json: rms_norm_eps is missing; 1e-06 is "
                                    "used, the default of llama",
                                    "config.json: num_key_value_heads is missing; 8 "
                                    "is used, the default of llama",
                                    "config.json: max_position_embeddings is missing; "
                                    "2048 is used, the default of llama",
                                    "config.json: rope_theta is missing; 10000 is "
                                    "used, the default of its class"};
            }},
        AcceptedCase{"mistral_kv_heads_left_out", Mistral,
                     [](json& c) { c.erase("num_key_value_heads"); },
                     [](const ModelConfig& m) { return m.num_kv_heads == 8; }},
        AcceptedCase{"qwen3_head_dim_left_out", Qwen3,
                     [](json& c) { c.erase("head_dim"); },
                     [](const ModelConfig& m) { return m.head_dim == 128; }},
        AcceptedCase{"full_attention_layers", Qwen3,
                     [](json& c) {
                       c["layer_types"] = json::array();
                       for (int i = 0; i < 4; ++i) {
                         c["layer_types"].push_back("full_attention");
                       }
                     },
                     [](const ModelConfig& m) { return m.num_layers == 4; }},
        AcceptedCase{"dual_chunk_serves_its_first_chunk", Qwen2,
                     [](json& c) {
                       c["max_position_embeddings"] = 1'010'000;
                       c["dual_chunk_attention_config"] = {{"chunk_size", 262144},
                                                           {"local_size", 8192}};
                     },
                     [](const ModelConfig& m) {
                       return m.max_tokens == 253'952 &&
                              m.max_tokens_reason ==
                                  " (its dual chunk attention, plain attention up to "
                                  "there, is not supported)";
                     }},
        AcceptedCase{"positions_beyond_our_limit", Llama,
                     [](json& c) { c["max_position_embeddings"] = 10'485'760; },
                     [](const ModelConfig& m) { return m.max_tokens == kSeqLenMax; }}),
    testing_support::CaseName());

TEST(GenerationConfigSpec, AddsItsEndTokensToThoseOfTheConfig) {
  ModelConfig config = *ParseModelConfig(Llama().dump());
  ASSERT_EQ(config.eos_token_ids, std::vector<int32_t>{2});
  EXPECT_TRUE(AddGenerationConfig(R"({"eos_token_id": [7, 2]})", config).ok());
  EXPECT_EQ(config.eos_token_ids, (std::vector<int32_t>{2, 7}));
  EXPECT_TRUE(AddGenerationConfig(R"({"temperature": 0.6})", config).ok());
  EXPECT_EQ(config.eos_token_ids, (std::vector<int32_t>{2, 7}));
}

struct GenerationCase {
  const char* name;
  std::string text;
  const char* message;
};

void PrintTo(const GenerationCase& c, std::ostream* out) { *out << c.name; }

class RefusedGenerationSpec : public testing::TestWithParam<GenerationCase> {};

TEST_P(RefusedGenerationSpec, LeavesTheConfigAsItWas) {
  ModelConfig config = *ParseModelConfig(Llama().dump());
  const Status status = AddGenerationConfig(GetParam().text, config);
  EXPECT_EQ(status.code(), kInvalid);
  EXPECT_EQ(status.message(),
            std::string("generation_config.json: ") + GetParam().message);
  EXPECT_EQ(config.eos_token_ids, std::vector<int32_t>{2});
}

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedGenerationSpec,
    testing::Values(GenerationCase{"no_json", "{", "is not valid JSON near byte 2"},
                    GenerationCase{"no_object", "[]", "is not an object"},
                    GenerationCase{
                        "outside_the_vocabulary", R"({"eos_token_id": [7, 1000]})",
                        "eos_token_id \"1000\" is not a token below vocab_size 1000"},
                    GenerationCase{"too_many",
                                   [] {
                                     json tokens = json::array();
                                     for (int i = 0; i < 65; ++i) tokens.push_back(i);
                                     return json{{"eos_token_id", tokens}}.dump();
                                   }(),
                                   "eos_token_id makes 65 end tokens, more than 64"}),
    testing_support::CaseName());

TEST(CanonicalArchitectureSpec, ChangesWithEverythingThatChangesTheResult) {
  const auto canonical = [](const json& config) {
    return CanonicalArchitecture(*ParseModelConfig(config.dump()));
  };
  const std::string plain = canonical(Llama());
  json same = Llama();
  same["eos_token_id"] = 5;
  same["max_position_embeddings"] = 8192;
  same["transformers_version"] = "9";
  EXPECT_EQ(canonical(same), plain);
  for (const auto& [key, value] :
       std::map<std::string, json>{{"rope_theta", 10001.0},
                                   {"rms_norm_eps", 2e-5},
                                   {"num_key_value_heads", 4},
                                   {"tie_word_embeddings", true},
                                   {"attention_bias", true},
                                   {"rope_scaling", YarnRope()}}) {
    json changed = Llama();
    changed[key] = value;
    EXPECT_NE(canonical(changed), plain) << key;
  }
  EXPECT_NE(canonical(Mistral()), plain);
}

}  // namespace
}  // namespace pbs
