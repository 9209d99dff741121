// From logits to what a caller asked for: the best tokens and their log-probabilities.
//
// Threading: stateless. Memory: one index per logit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace pbs::server {

struct ScoredToken {
  int32_t token_id = 0;
  float log_probability = 0;  // natural logarithm of the softmax
};

// The `count` best tokens, best first; equal logits in order of the token id. All of
// them when there are fewer. Requires logits and count >= 0. Internal when a logit is
// NaN or +infinity.
absl::StatusOr<std::vector<ScoredToken>> BestTokens(std::span<const float> logits,
                                                    int32_t count);

}  // namespace pbs::server
