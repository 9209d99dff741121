#include "server/model/rope_config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace pbs {
namespace {

constexpr double kThetaMin = 1.5;  // the logarithm must stay away from 0
constexpr double kThetaMax = 1e12;
constexpr double kFactorMax = 1e4;
constexpr int64_t kOriginalPositionMax = 1 << 24;
// What "not given" means in the published implementations of yarn.
constexpr double kYarnBetaFast = 32;
constexpr double kYarnBetaSlow = 1;

Status Unsupported(const JsonObject& object, const std::string& message) {
  return Unimplemented(object.Error(message).message());
}

StatusOr<RopeType> ParseType(const JsonObject& rope) {
  const bool has_new = rope.Has("rope_type");
  if (!has_new && !rope.Has("type")) {
    return rope.Error("rope_type is missing");
  }
  PBS_ASSIGN_OR_RETURN(const std::string name,
                       rope.String(has_new ? "rope_type" : "type"));
  if (has_new && rope.Has("type")) {
    PBS_ASSIGN_OR_RETURN(const std::string old_name, rope.String("type"));
    if (old_name != name) {
      return rope.Error("rope_type " + Quoted(name) + " contradicts type " +
                        Quoted(old_name));
    }
  }
  for (RopeType type :
       {RopeType::kDefault, RopeType::kLinear, RopeType::kLlama3, RopeType::kYarn}) {
    if (name == RopeTypeName(type)) return type;
  }
  if (name == "dynamic" || name == "longrope" || name == "su") {
    return Unsupported(rope,
                       "rope_type " + Quoted(name) +
                           " is refused: its frequencies depend on the length, so "
                           "cached keys would change meaning during decoding");
  }
  return Unsupported(rope, "rope_type " + Quoted(name) +
                               " is not one of default, linear, llama3, yarn");
}

Status CheckKeys(const JsonObject& rope, RopeType type,
                 std::initializer_list<std::string_view> accepted) {
  constexpr std::string_view kAlways[] = {"rope_type", "type", "rope_theta",
                                          "partial_rotary_factor"};
  for (const auto& [key, value] : rope.json().items()) {
    const bool known = std::count(accepted.begin(), accepted.end(), key) > 0 ||
                       std::count(std::begin(kAlways), std::end(kAlways), key) > 0;
    if (!known && !value.is_null()) {
      return rope.Error("unknown key " + Quoted(key) + " for rope_type " +
                        RopeTypeName(type));
    }
  }
  return OkStatus();
}

Status ParseLinear(const JsonObject& rope, RopeConfig& config) {
  PBS_RETURN_IF_ERROR(CheckKeys(rope, config.type, {"factor"}));
  PBS_ASSIGN_OR_RETURN(config.factor, rope.Number("factor", 1, kFactorMax));
  return OkStatus();
}

// transformers takes max_position_embeddings where the key is missing.
StatusOr<int64_t> OriginalPositions(const JsonObject& rope, const RopeContext& context,
                                    std::vector<std::string>& notes) {
  constexpr std::string_view kKey = "original_max_position_embeddings";
  if (!rope.Has(kKey)) {
    notes.push_back(rope.Error(std::string(kKey) + " is missing; " +
                               std::to_string(context.max_position) +
                               " is used, the max_position_embeddings")
                        .message());
  }
  return rope.IntOr(kKey, context.max_position, 1, kOriginalPositionMax);
}

Status ParseLlama3(const JsonObject& rope, const RopeContext& context,
                   RopeConfig& config, std::vector<std::string>& notes) {
  PBS_RETURN_IF_ERROR(CheckKeys(rope, config.type,
                                {"factor", "low_freq_factor", "high_freq_factor",
                                 "original_max_position_embeddings"}));
  PBS_ASSIGN_OR_RETURN(config.factor, rope.Number("factor", 1, kFactorMax));
  PBS_ASSIGN_OR_RETURN(config.low_freq_factor,
                       rope.Number("low_freq_factor", 1e-3, kFactorMax));
  PBS_ASSIGN_OR_RETURN(config.high_freq_factor,
                       rope.Number("high_freq_factor", 1e-3, kFactorMax));
  if (config.low_freq_factor >= config.high_freq_factor) {
    return rope.Error("low_freq_factor " + NumberText(config.low_freq_factor) +
                      " is not below high_freq_factor " +
                      NumberText(config.high_freq_factor));
  }
  PBS_ASSIGN_OR_RETURN(config.original_max_position,
                       OriginalPositions(rope, context, notes));
  return OkStatus();
}

double YarnScale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

// Given outright, or derived from the factor and (where both are given) the mscales.
StatusOr<double> YarnAttentionFactor(const JsonObject& rope, double factor) {
  PBS_ASSIGN_OR_RETURN(const double mscale, rope.NumberOr("mscale", 0, 0, 100));
  PBS_ASSIGN_OR_RETURN(const double all_dim,
                       rope.NumberOr("mscale_all_dim", 0, 0, 100));
  const double derived = mscale > 0 && all_dim > 0
                             ? YarnScale(factor, mscale) / YarnScale(factor, all_dim)
                             : YarnScale(factor, 1);
  return rope.NumberOr("attention_factor", derived, 1e-3, 100);
}

// Keys that one decode tier reads and the others do not.
Status ParseYarnExtras(const JsonObject& rope, const RopeContext& context,
                       RopeConfig& config, std::vector<std::string>& notes) {
  PBS_ASSIGN_OR_RETURN(const double extrapolation,
                       rope.NumberOr("extrapolation_factor", 1, 0, 100));
  if (extrapolation != 1) {
    return Unsupported(rope, "extrapolation_factor " + NumberText(extrapolation) +
                                 " is not supported, only 1");
  }
  PBS_ASSIGN_OR_RETURN(const bool scaled, rope.BoolOr("apply_yarn_scaling", true));
  if (!scaled) return Unsupported(rope, "apply_yarn_scaling false is not supported");
  PBS_ASSIGN_OR_RETURN(const double attn_factor,
                       rope.NumberOr("attn_factor", 1, 1e-3, 100));
  if (attn_factor == 1) return OkStatus();
  const bool applied = context.options.attn_factor == AttnFactor::kApplied;
  if (applied) config.attention_factor *= attn_factor;
  notes.push_back(rope.Error("attn_factor " + NumberText(attn_factor) + " is " +
                             (applied ? "applied, as by vLLM; transformers ignores it"
                                      : "ignored, as by transformers; vLLM applies it"))
                      .message());
  return OkStatus();
}

Status ParseYarn(const JsonObject& rope, const RopeContext& context, RopeConfig& config,
                 std::vector<std::string>& notes) {
  PBS_RETURN_IF_ERROR(CheckKeys(
      rope, config.type,
      {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
       "beta_slow", "mscale", "mscale_all_dim", "truncate", "attn_factor",
       "extrapolation_factor", "apply_yarn_scaling", "finetuned"}));
  PBS_ASSIGN_OR_RETURN(config.factor, rope.Number("factor", 1, kFactorMax));
  PBS_ASSIGN_OR_RETURN(config.original_max_position,
                       OriginalPositions(rope, context, notes));
  PBS_ASSIGN_OR_RETURN(config.beta_fast,
                       rope.NumberOr("beta_fast", kYarnBetaFast, 1e-3, 1e6));
  PBS_ASSIGN_OR_RETURN(config.beta_slow,
                       rope.NumberOr("beta_slow", kYarnBetaSlow, 1e-3, 1e6));
  if (config.beta_slow > config.beta_fast) {
    return rope.Error("beta_slow " + NumberText(config.beta_slow) +
                      " exceeds beta_fast " + NumberText(config.beta_fast));
  }
  PBS_ASSIGN_OR_RETURN(config.truncate, rope.BoolOr("truncate", true));
  PBS_ASSIGN_OR_RETURN(config.attention_factor,
                       YarnAttentionFactor(rope, config.factor));
  return ParseYarnExtras(rope, context, config, notes);
}

// One object of settings, without theta.
StatusOr<RopeConfig> ParseScaling(const JsonObject& rope, const RopeContext& context,
                                  std::vector<std::string>& notes) {
  RopeConfig config;
  PBS_ASSIGN_OR_RETURN(config.type, ParseType(rope));
  PBS_ASSIGN_OR_RETURN(const double partial,
                       rope.NumberOr("partial_rotary_factor", 1, 0, 1));
  if (partial != 1) {
    return Unsupported(rope, "partial_rotary_factor " + NumberText(partial) +
                                 " is not supported, only 1");
  }
  Status status;
  switch (config.type) {
    case RopeType::kDefault:
      status = CheckKeys(rope, config.type, {});
      break;
    case RopeType::kLinear:
      status = ParseLinear(rope, config);
      break;
    case RopeType::kLlama3:
      status = ParseLlama3(rope, context, config, notes);
      break;
    case RopeType::kYarn:
      status = ParseYarn(rope, context, config, notes);
      break;
  }
  PBS_RETURN_IF_ERROR(status);
  return config;
}

// Reads theta from `object` when it is there; it must equal the one read before.
Status MergeTheta(const JsonObject& object, double& theta) {
  if (!object.Has("rope_theta")) return OkStatus();
  PBS_ASSIGN_OR_RETURN(const double found,
                       object.Number("rope_theta", kThetaMin, kThetaMax));
  if (theta != 0 && theta != found) {
    return object.Error("rope_theta " + NumberText(found) +
                        " contradicts the other one, " + NumberText(theta));
  }
  theta = found;
  return OkStatus();
}

}  // namespace

const char* RopeTypeName(RopeType type) {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kLlama3:
      return "llama3";
    case RopeType::kYarn:
      return "yarn";
  }
  return "unknown";
}

const char* AttnFactorName(AttnFactor attn_factor) {
  return attn_factor == AttnFactor::kApplied ? "applied" : "ignored";
}

StatusOr<RopeConfig> ParseRopeConfig(const JsonObject& config,
                                     const RopeContext& context,
                                     std::vector<std::string>& notes) {
  RopeConfig rope;
  double theta = 0;
  PBS_RETURN_IF_ERROR(MergeTheta(config, theta));
  bool found = false;
  std::vector<std::string> rope_notes;  // of one object: two say the same
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!config.Has(key)) continue;
    PBS_ASSIGN_OR_RETURN(const JsonObject object, config.Object(key));
    PBS_RETURN_IF_ERROR(MergeTheta(object, theta));
    rope_notes.clear();
    PBS_ASSIGN_OR_RETURN(const RopeConfig parsed,
                         ParseScaling(object, context, rope_notes));
    if (found && parsed != rope) {
      return config.Error("rope_parameters and rope_scaling contradict each other");
    }
    rope = parsed;
    found = true;
  }
  notes.insert(notes.end(), rope_notes.begin(), rope_notes.end());
  if (theta == 0) {
    theta = context.theta_default;
    notes.push_back(config
                        .Error("rope_theta is missing; " + NumberText(theta) +
                               " is used, the default of its class")
                        .message());
  }
  rope.theta = theta;
  return rope;
}

}  // namespace pbs
