#include "server/engine/logit_scores.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/status/status.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

// log(sum(exp(logits))), or what makes it no number.
double LogSumExp(std::span<const float> logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - max);
  return max + std::log(sum);
}

}  // namespace

absl::StatusOr<std::vector<ScoredToken>> BestTokens(std::span<const float> logits,
                                                    int32_t count) {
  PBS_CHECK(!logits.empty() && count >= 0);
  const double log_sum = LogSumExp(logits);
  if (!std::isfinite(log_sum)) {
    return absl::InternalError("the model's logits are not finite");
  }
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto best = ids.begin() + std::min<int64_t>(count, std::ssize(ids));
  std::partial_sort(ids.begin(), best, ids.end(), [logits](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  std::vector<ScoredToken> tokens;
  for (auto id = ids.begin(); id != best; ++id) {
    tokens.push_back({*id, static_cast<float>(logits[*id] - log_sum)});
  }
  return tokens;
}

}  // namespace pbs::server
