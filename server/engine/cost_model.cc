#include "server/engine/cost_model.h"

#include <algorithm>
#include <cmath>
#include <iterator>
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
  if (found == entries_.end()) return FromOtherRungs(key, work);
  const Entry& entry = found->second;
  return Prediction{.seconds = entry.Seconds(work),
                    .fresh = now - entry.measured <= kFreshTime};
}

double CostModel::Entry::Seconds(const Work& work) const {
  return linear.Estimate(work.linear, kExtrapolatedLengthsMax) +
         quadratic.Estimate(work.quadratic,
                            kExtrapolatedLengthsMax * kExtrapolatedLengthsMax);
}

std::optional<Prediction> CostModel::FromOtherRungs(const CostKey& key,
                                                    const Work& work) const {
  const auto above = entries_.upper_bound(key);
  const auto of_rung = [&](Entries::const_iterator entry) -> std::optional<double> {
    if (entry == entries_.end()) return std::nullopt;
    CostKey same = key;
    same.rung = entry->first.rung;
    if (same != entry->first) return std::nullopt;
    return entry->second.Seconds(work);
  };
  const auto below = above == entries_.begin() ? entries_.end() : std::prev(above);
  const std::optional<double> high = of_rung(above);
  const std::optional<double> low = of_rung(below);
  if (!high.has_value() && !low.has_value()) return std::nullopt;
  if (!high.has_value() || !low.has_value()) return Prediction{high ? *high : *low};
  const double share =
      (key.rung - below->first.rung) / (above->first.rung - below->first.rung);
  return Prediction{*low + share * (*high - *low)};
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
