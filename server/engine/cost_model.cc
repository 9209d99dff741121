#include "server/engine/cost_model.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace pbs::server {
namespace {

// A measurement's weight falls to 1/e while this much further work is measured.
constexpr double kFadeSeconds = 300;

}  // namespace

void CostModel::Rate::Add(double units, double seconds, double fade) {
  if (units <= 0) return;
  products = products * fade + units * seconds;
  squares = squares * fade + units * units;
  units_max = std::max(units_max, units);
}

double CostModel::Rate::Estimate(double units, double extrapolation_max) const {
  if (squares <= 0) return 0;
  return products / squares * std::min(units, extrapolation_max * units_max);
}

std::optional<Prediction> CostModel::Predict(const CostKey& key, const Work& work,
                                             absl::Time now) const {
  MutexLock lock(mutex_);
  const auto found = entries_.find(key);
  if (found == entries_.end()) return std::nullopt;
  const Entry& entry = found->second;
  Prediction prediction;
  prediction.seconds =
      entry.linear.Estimate(work.linear, kExtrapolatedLengthsMax) +
      entry.quadratic.Estimate(work.quadratic,
                               kExtrapolatedLengthsMax * kExtrapolatedLengthsMax);
  prediction.fresh = now - entry.measured <= kFreshTime;
  return prediction;
}

void CostModel::Measure(const CostKey& key, const Work& work, const Work& seconds,
                        absl::Time now) {
  const double fade = std::exp(-(seconds.linear + seconds.quadratic) / kFadeSeconds);
  MutexLock lock(mutex_);
  Entry& entry = entries_[key];
  entry.linear.Add(work.linear, seconds.linear, fade);
  entry.quadratic.Add(work.quadratic, seconds.quadratic, fade);
  entry.measured = now;
}

}  // namespace pbs::server
