// Greedy choice, and the best few tokens, from logits.
//
// Threading: pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace pbs {

struct TokenScore {
  int32_t token_id = 0;
  float log_probability = 0;  // natural log of the softmax
};

// The token of the largest logit; of equal logits, the lowest id. NaN never wins.
// Requires at least one logit.
int32_t Argmax(std::span<const float> logits);

// The min(count, logits.size()) best tokens in falling order; of equal logits, the
// lowest id first.
std::vector<TokenScore> TopTokens(std::span<const float> logits, int32_t count);

}  // namespace pbs
