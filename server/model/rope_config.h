// Rotary position settings, in both spellings that model folders use.
//
// transformers 5 writes `rope_parameters {rope_theta, rope_type, ...}`; most published
// folders have `rope_theta` and `rope_scaling` (whose type is `rope_type` or, older,
// `type`). Both are read; where both speak, they must agree.
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
// sequence, so keys cached during prefill would change meaning while decoding goes on.
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

// What yarn's attn_factor does. Decode tiers disagree (ADR 18): vLLM multiplies cosines
// and sines by it, transformers does not read it. Caches of the one are wrong for the
// other, so the result is part of the model digest.
enum class AttnFactor : uint8_t { kApplied, kIgnored };

// "applied", "ignored".
const char* AttnFactorName(AttnFactor attn_factor);

struct RopeOptions {
  AttnFactor attn_factor = AttnFactor::kApplied;
};

// What config.json says outside of the rope settings.
struct RopeContext {
  double theta_default = 0;
  int64_t max_position = 0;  // max_position_embeddings
  RopeOptions options = {};
};

// From the top level of config.json. InvalidArgument names key, value and limit;
// Unimplemented gives the reason why a kind of scaling is refused. A scaling key that
// we do not know is refused: it might change the result. Appends to `notes` what was
// assumed.
StatusOr<RopeConfig> ParseRopeConfig(const JsonObject& config,
                                     const RopeContext& context,
                                     std::vector<std::string>& notes);

}  // namespace pbs
