// Rotary position settings, in both spellings that model folders use.
//
// transformers 5 writes `rope_parameters {rope_theta, rope_type, ...}`; most published
// folders have `rope_theta` and `rope_scaling` (whose type is `rope_type` or, older,
// `type`). Both are read. A folder that has both must state the same in both.
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pbs/status.h"
#include "server/model/json.h"

namespace pbs {

// dynamic (NTK) and longrope are refused: their frequencies depend on the length of the
// sequence, so keys cached during prefill would be wrong for later decode steps.
enum class RopeType : uint8_t { kDefault, kLinear, kLlama3, kYarn };

struct RopeConfig {
  RopeType type = RopeType::kDefault;
  double theta = 0;
  double factor = 1;                  // linear, llama3, yarn
  int64_t original_max_position = 0;  // llama3, yarn
  double low_freq_factor = 0;         // llama3
  double high_freq_factor = 0;        // llama3
  double beta_fast = 0;               // yarn: rotations where scaling begins
  double beta_slow = 0;               // yarn: rotations where it is complete
  bool truncate = false;              // yarn: ramp bounds are whole dimensions
  double attention_factor = 1;        // multiplies cosines and sines

  bool operator==(const RopeConfig&) const = default;
};

// "default", "linear", "llama3", "yarn".
const char* RopeTypeName(RopeType type);

// The use of yarn's attn_factor. Decode tiers disagree (ADR 18): vLLM multiplies
// cosines and sines by it, transformers ignores it. Caches of one are wrong for the
// other, so the resulting factor is part of the model digest.
enum class AttnFactor : uint8_t { kApplied, kIgnored };

// "applied", "ignored".
const char* AttnFactorName(AttnFactor attn_factor);

struct RopeOptions {
  AttnFactor attn_factor = AttnFactor::kApplied;
};

// Settings of config.json outside of its rope settings.
struct RopeContext {
  double theta_default = 0;
  int64_t max_position = 0;  // max_position_embeddings
  RopeOptions options = {};
};

// Parses the top level of config.json. InvalidArgument names key, value and limit;
// Unimplemented states why a kind of scaling is refused. An unknown scaling key is
// refused, because it might change the result. Appends assumptions to `notes`.
StatusOr<RopeConfig> ParseRopeConfig(const JsonObject& config,
                                     const RopeContext& context,
                                     std::vector<std::string>& notes);

}  // namespace pbs
