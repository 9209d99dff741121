#include "server/model/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pbs/check.h"

namespace pbs {
namespace {

// NaN sorts as -inf, so that the order is total whatever the logits hold.
float Key(float logit) { return std::isnan(logit) ? -INFINITY : logit; }

}  // namespace

int32_t Argmax(std::span<const float> logits) {
  PBS_CHECK(!logits.empty());
  const auto best = std::max_element(logits.begin(), logits.end(),
                                     [](float a, float b) { return Key(a) < Key(b); });
  return static_cast<int32_t>(best - logits.begin());
}

std::vector<TokenScore> TopTokens(std::span<const float> logits, int32_t count) {
  if (logits.empty() || count <= 0) return {};
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const size_t kept = std::min(ids.size(), static_cast<size_t>(count));
  std::partial_sort(ids.begin(), ids.begin() + static_cast<int64_t>(kept), ids.end(),
                    [&](int32_t a, int32_t b) {
                      const float x = Key(logits[a]);
                      const float y = Key(logits[b]);
                      return x != y ? x > y : a < b;
                    });
  const double top = logits[ids[0]];
  double sum = 0;
  for (float logit : logits) sum += std::exp(logit - top);
  std::vector<TokenScore> best;
  for (size_t i = 0; i < kept; ++i) {
    best.push_back({ids[i], static_cast<float>(logits[ids[i]] - top - std::log(sum))});
  }
  return best;
}

}  // namespace pbs
