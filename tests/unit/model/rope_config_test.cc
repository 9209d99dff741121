// Spec: server/model/rope_config.h, through whole configs.
#include "server/model/rope_config.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "tests/support/case_name.h"
#include "tests/unit/model/config_cases.h"

namespace pbs {
namespace {

using namespace config_cases;  // NOLINT: the tables below read as prose

class RefusedRopeSpec : public testing::TestWithParam<RefusedCase> {};

TEST_P(RefusedRopeSpec, NamesKeyValueAndLimit) { ExpectRefused(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedRopeSpec,
    testing::Values(
        RefusedCase{"theta_one", Llama, [](json& c) { c["rope_theta"] = 1; }, kInvalid,
                    "rope_theta 1 is outside [1.5, 1e+12]"},
        RefusedCase{"theta_contradicts", Llama,
                    [](json& c) {
                      c["rope_parameters"] = {{"rope_type", "default"},
                                              {"rope_theta", 500000.0}};
                    },
                    kInvalid,
                    "rope_parameters: rope_theta 500000 contradicts the other one, "
                    "10000"},
        RefusedCase{"spellings_contradict", Llama,
                    [](json& c) {
                      c["rope_parameters"] = Llama3Rope();
                      c["rope_scaling"] = Llama3Rope();
                      c["rope_scaling"]["factor"] = 32.0;
                    },
                    kInvalid, "rope_parameters and rope_scaling contradict each other"},
        RefusedCase{"types_contradict", Llama,
                    [](json& c) {
                      c["rope_scaling"] = {
                          {"rope_type", "linear"}, {"type", "yarn"}, {"factor", 2}};
                    },
                    kInvalid,
                    "rope_scaling: rope_type \"linear\" contradicts type \"yarn\""},
        RefusedCase{"type_missing", Llama,
                    [](json& c) {
                      c["rope_scaling"] = {{"factor", 2}};
                    },
                    kInvalid, "rope_scaling: rope_type is missing"},
        RefusedCase{"not_an_object", Llama, [](json& c) { c["rope_scaling"] = 2; },
                    kInvalid, "rope_scaling is of type number, not an object"},
        RefusedCase{"dynamic", Llama,
                    [](json& c) {
                      c["rope_scaling"] = {{"type", "dynamic"}, {"factor", 2}};
                    },
                    kUnsupported,
                    "rope_scaling: rope_type \"dynamic\" is refused: its frequencies "
                    "depend on the length, so cached keys would change meaning during "
                    "decoding"},
        RefusedCase{
            "longrope", Llama,
            [](json& c) {
              c["rope_parameters"] = {{"rope_type", "longrope"}};
            },
            kUnsupported,
            "rope_parameters: rope_type \"longrope\" is refused: its frequencies "
            "depend on the length, so cached keys would change meaning during "
            "decoding"},
        RefusedCase{"unknown_type", Llama,
                    [](json& c) {
                      c["rope_scaling"] = {{"type", "mrope"}};
                    },
                    kUnsupported,
                    "rope_scaling: rope_type \"mrope\" is not one of default, linear, "
                    "llama3, yarn"},
        RefusedCase{"unknown_key", Llama,
                    [](json& c) {
                      c["rope_scaling"] = YarnRope();
                      c["rope_scaling"]["short_factor"] = true;
                    },
                    kInvalid,
                    "rope_scaling: unknown key \"short_factor\" for rope_type yarn"},
        RefusedCase{"linear_without_factor", Llama,
                    [](json& c) {
                      c["rope_scaling"] = {{"type", "linear"}};
                    },
                    kInvalid, "rope_scaling: factor is missing"},
        RefusedCase{"linear_factor_below_one", Llama,
                    [](json& c) {
                      c["rope_scaling"] = {{"type", "linear"}, {"factor", 0.5}};
                    },
                    kInvalid, "rope_scaling: factor 0.5 is outside [1, 10000]"},
        RefusedCase{"llama3_band_upside_down", Llama,
                    [](json& c) {
                      c["rope_scaling"] = Llama3Rope();
                      c["rope_scaling"]["low_freq_factor"] = 4.0;
                    },
                    kInvalid,
                    "rope_scaling: low_freq_factor 4 is not below high_freq_factor 4"},
        RefusedCase{"yarn_extrapolation", Llama,
                    [](json& c) {
                      c["rope_scaling"] = YarnRope();
                      c["rope_scaling"]["extrapolation_factor"] = 0.5;
                    },
                    kUnsupported,
                    "rope_scaling: extrapolation_factor 0.5 is not supported, only 1"},
        RefusedCase{"yarn_without_its_scaling", Llama,
                    [](json& c) {
                      c["rope_scaling"] = YarnRope();
                      c["rope_scaling"]["apply_yarn_scaling"] = false;
                    },
                    kUnsupported,
                    "rope_scaling: apply_yarn_scaling false is not supported"},
        RefusedCase{"yarn_attn_factor_zero", Llama,
                    [](json& c) {
                      c["rope_scaling"] = YarnRope();
                      c["rope_scaling"]["attn_factor"] = 0;
                    },
                    kInvalid, "rope_scaling: attn_factor 0 is outside [0.001, 100]"},
        RefusedCase{"yarn_betas_upside_down", Llama,
                    [](json& c) {
                      c["rope_scaling"] = YarnRope();
                      c["rope_scaling"]["beta_slow"] = 64;
                    },
                    kInvalid, "rope_scaling: beta_slow 64 exceeds beta_fast 32"},
        RefusedCase{
            "partial_inside", Llama,
            [](json& c) {
              c["rope_parameters"] = {{"rope_type", "default"},
                                      {"rope_theta", 10000.0},
                                      {"partial_rotary_factor", 0.25}};
            },
            kUnsupported,
            "rope_parameters: partial_rotary_factor 0.25 is not supported, only "
            "1"}),
    testing_support::CaseName());

RopeConfig ParsedRope(const std::function<void(json&)>& change) {
  json config = Llama();
  change(config);
  return ParseModelConfig(config.dump())->rope;
}

class AcceptedRopeSpec : public testing::TestWithParam<AcceptedCase> {};

TEST_P(AcceptedRopeSpec, MeansWhatHuggingFaceMeans) { ExpectAccepted(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    Cases, AcceptedRopeSpec,
    testing::Values(
        AcceptedCase{"new_spelling", Llama,
                     [](json& c) {
                       c.erase("rope_theta");
                       c["rope_parameters"] = Llama3Rope();
                       c["rope_parameters"]["rope_theta"] = 500000.0;
                     },
                     [](const ModelConfig& m) {
                       return m.rope.type == RopeType::kLlama3 &&
                              m.rope.theta == 500000 && m.rope.factor == 8 &&
                              m.rope.original_max_position == 1024;
                     }},
        AcceptedCase{
            "both_spellings_that_agree", Llama,
            [](json& c) {
              c["rope_parameters"] = Llama3Rope();
              c["rope_scaling"] = Llama3Rope();
              c["rope_parameters"]["rope_theta"] = 10000.0;
            },
            [](const ModelConfig& m) { return m.rope.type == RopeType::kLlama3; }},
        AcceptedCase{"old_type_key", Llama,
                     [](json& c) {
                       c["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
                     },
                     [](const ModelConfig& m) {
                       return m.rope.type == RopeType::kLinear && m.rope.factor == 4 &&
                              m.max_tokens == 4096;
                     }},
        AcceptedCase{
            "yarn_defaults", Llama, [](json& c) { c["rope_scaling"] = YarnRope(); },
            [](const ModelConfig& m) {
              return m.rope.beta_fast == 32 && m.rope.beta_slow == 1 &&
                     m.rope.truncate &&
                     std::abs(m.rope.attention_factor - (0.1 * std::log(4.0) + 1)) <
                         1e-12 &&
                     m.max_tokens == 4 * 2048;
            }},
        AcceptedCase{"yarn_given_attention_factor", Llama,
                     [](json& c) {
                       c["rope_scaling"] = YarnRope();
                       c["rope_scaling"]["attention_factor"] = 1.5;
                       c["rope_scaling"]["truncate"] = false;
                     },
                     [](const ModelConfig& m) {
                       return m.rope.attention_factor == 1.5 && !m.rope.truncate;
                     }},
        AcceptedCase{"yarn_mscales", Llama,
                     [](json& c) {
                       c["rope_scaling"] = YarnRope();
                       c["rope_scaling"]["mscale"] = 2.0;
                       c["rope_scaling"]["mscale_all_dim"] = 1.0;
                     },
                     [](const ModelConfig& m) {
                       const double log4 = std::log(4.0);
                       return std::abs(m.rope.attention_factor -
                                       (0.2 * log4 + 1) / (0.1 * log4 + 1)) < 1e-12;
                     }},
        AcceptedCase{"theta_left_out", Llama, [](json& c) { c.erase("rope_theta"); },
                     [](const ModelConfig& m) { return m.rope.theta == 10000; }},
        AcceptedCase{
            "llama3_original_left_out", Llama,
            [](json& c) {
              c["rope_scaling"] = Llama3Rope();
              c["rope_scaling"].erase("original_max_position_embeddings");
            },
            [](const ModelConfig& m) { return m.rope.original_max_position == 4096; }},
        AcceptedCase{"yarn_original_left_out", Llama,
                     [](json& c) {
                       c["rope_scaling"] = {{"type", "yarn"}, {"factor", 4}};
                     },
                     [](const ModelConfig& m) {
                       return m.rope.original_max_position == 4096 &&
                              m.max_tokens == 4 * 4096 &&
                              m.notes ==
                                  std::vector<std::string>{
                                      "config.json: rope_scaling: "
                                      "original_max_position_embeddings is missing; "
                                      "4096 is used, the max_position_embeddings"};
                     }},
        AcceptedCase{"yarn_keys_without_effect", Llama,
                     [](json& c) {
                       c["rope_scaling"] = YarnRope();
                       c["rope_scaling"]["finetuned"] = true;
                       c["rope_scaling"]["extrapolation_factor"] = 1.0;
                       c["rope_scaling"]["apply_yarn_scaling"] = true;
                       c["rope_scaling"]["attn_factor"] = 1.0;
                     },
                     [](const ModelConfig& m) {
                       return m.notes.empty() && m.rope == ParsedRope([](json& c) {
                                                   c["rope_scaling"] = YarnRope();
                                                 });
                     }}),
    testing_support::CaseName());

// A DeepSeek distillation of Qwen3 has it; the product is 1.
TEST(AttnFactorSpec, IsAppliedOrIgnoredAsTheOptionSays) {
  json config = Llama();
  config["rope_scaling"] = YarnRope();
  config["rope_scaling"]["attn_factor"] = 0.8782488562869419;
  const auto applied =
      *ParseModelConfig(config.dump(), {.attn_factor = AttnFactor::kApplied});
  EXPECT_NEAR(applied.rope.attention_factor, 1.0, 1e-12);
  EXPECT_EQ(applied.notes, std::vector<std::string>{
                               "config.json: rope_scaling: attn_factor 0.878249 "
                               "is applied, as by vLLM; transformers ignores it"});
  const auto ignored =
      *ParseModelConfig(config.dump(), {.attn_factor = AttnFactor::kIgnored});
  EXPECT_NEAR(ignored.rope.attention_factor, 0.1 * std::log(4.0) + 1, 1e-12);
  EXPECT_EQ(ignored.notes, std::vector<std::string>{
                               "config.json: rope_scaling: attn_factor 0.878249 "
                               "is ignored, as by transformers; vLLM applies it"});
  EXPECT_NE(CanonicalArchitecture(applied), CanonicalArchitecture(ignored));
}

}  // namespace
}  // namespace pbs
