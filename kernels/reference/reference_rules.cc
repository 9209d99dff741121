#include "reference/reference_rules.h"

#include <algorithm>
#include <numeric>

#include "reference/operands.h"

namespace pbs::reference {

std::vector<int32_t> ByFallingScore(const std::vector<double>& scores) {
  std::vector<int32_t> by(scores.size());
  std::iota(by.begin(), by.end(), 0);
  std::stable_sort(by.begin(), by.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  return by;
}

std::vector<bool> Cover(std::vector<double> logits, double threshold) {
  std::vector<bool> keep(logits.size(), threshold >= 1.0);
  if (threshold >= 1.0) return keep;
  Softmax(logits);
  double mass = 0;
  for (int32_t block : ByFallingScore(logits)) {
    keep[block] = true;
    mass += logits[block];
    if (mass >= threshold) break;
  }
  return keep;
}

std::vector<bool> CoverWithForced(const std::vector<double>& masses, double threshold,
                                  const ForcedMass& forced) {
  const auto count = static_cast<int32_t>(masses.size());
  std::vector<bool> keep(masses.size(), threshold >= 1.0);
  if (threshold >= 1.0) return keep;
  const double need = threshold * std::accumulate(masses.begin(), masses.end(), 0.0);
  std::vector<bool> ranked(masses.size(), true);
  double forced_mass = 0;
  for (int32_t block = 0; block < count; ++block) {
    const bool is_first = block == forced.first;
    if (block != forced.own && !is_first) continue;
    keep[block] = true;
    if (is_first && block != forced.own && forced.lags) continue;
    ranked[block] = false;
    forced_mass += masses[block];
  }
  std::vector<double> larger;  // masses of the others that were looked at
  for (int32_t block : ByFallingScore(masses)) {
    if (!ranked[block]) continue;
    const size_t r = larger.size() + 1;
    size_t num_counted = larger.size();
    if (forced.lags) num_counted = r < 2 ? 0 : r - 2;
    const double before =
        std::accumulate(larger.begin(), larger.begin() + num_counted, forced_mass);
    const bool takes = forced.lags && r == 1 ? need > 0 : before < need;
    if (!takes) break;
    keep[block] = true;
    larger.push_back(masses[block]);
  }
  return keep;
}

std::vector<bool> ShareOfLargest(const std::vector<double>& scores, double share) {
  double largest = 0;
  for (double score : scores) largest = std::max(largest, score);
  std::vector<bool> keep;
  for (double score : scores) keep.push_back(score >= share * largest);
  return keep;
}

}  // namespace pbs::reference
