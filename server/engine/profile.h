// A profile: attention options under a name, which a request may ask for. A calibrated
// one has a threshold for every query head of a model (docs/PROTOCOL.md, "Profiles").
//
// Threading: values, immutable once served. Memory: four bytes per query head.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pbs/attention_options.h"

namespace pbs::server {

struct Profile {
  std::string name;
  AttentionOptions options;                 // without dense_fallback
  std::optional<bool> dense_fallback = {};  // unset: the RPC's own default
  // A threshold for every query head of every layer, [num_layers, num_heads], each in
  // (0, 1] and not all equal; empty: options.threshold.
  std::vector<float> head_thresholds = {};
  // 64 hex digits over head_thresholds; empty without them.
  std::string thresholds_digest = {};
};

// Every model has it, and no file may take its name.
inline constexpr char kPaperProfile[] = "paper";

// pbs as its published code runs it.
inline Profile PaperProfile() {
  return {.name = kPaperProfile, .options = DefaultOptions(Method::kPbs, true)};
}

}  // namespace pbs::server
