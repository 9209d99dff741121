// Predicts how long work takes, from measurements of earlier work.
//
// A request's work has a part that grows with its tokens and a part that grows with
// their square. The two are timed separately, and each has its own rate in seconds per
// unit: least squares through the origin over all measurements. The weight of a
// measurement decays with the seconds of work that were measured after it. So large
// requests count more than small ones, whose fixed costs would mislead, and many small
// requests do not displace a large one.
//
// A prefill whose threshold was never measured is predicted from the nearest thresholds
// that were: between them by a straight line, which lies above the true curve, because
// time rises ever faster towards a threshold of 1; beside them by the nearest.
//
// Threading: safe from any thread. Memory: one entry per key; keys come from the
// models, their profiles, the enums and the ladder of thresholds.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <optional>

#include "absl/time/time.h"
#include "pbs/attention.h"
#include "pbs/dtype.h"
#include "server/base/mutex.h"

namespace pbs::server {

// Key of work that differs only in its size.
struct CostKey {
  const void* model = nullptr;            // null for raw attention
  const void* head_thresholds = nullptr;  // of a profile
  Method method = Method::kDense;
  DType dtype = DType::kF32;
  int32_t head_dim = 0;
  // Rung of the threshold (threshold_ladder.h); 0 for what has none. The last member,
  // so that keys that differ by it alone are neighbours.
  float rung = 0;

  auto operator<=>(const CostKey&) const = default;
};

// Units of work. The caller chooses them, the same for every call with one key: tokens
// and tokens^2 for a prefill, 0 and multiply-adds for raw attention.
struct Work {
  double linear = 0;
  double quadratic = 0;
};

struct Prediction {
  double seconds = 0;
  // True when it rests on recent measurements, so that a request may be refused because
  // of it. Otherwise one request should be let through: a node that was slow once would
  // else refuse forever.
  bool fresh = false;
};

class CostModel {
 public:
  // A request longer than this many times the longest measured length is predicted as
  // if it had that product as its length. The prediction is then a lower bound.
  static constexpr double kExtrapolatedLengthsMax = 4;
  static constexpr absl::Duration kFreshTime = absl::Minutes(1);

  // nullopt until work with this key, or with one that differs by its rung alone, was
  // measured. What rests on another rung is not fresh.
  std::optional<Prediction> Predict(const CostKey& key, const Work& work,
                                    absl::Time now) const;

  // Adds a measurement: `work` took `seconds`, part by part.
  void Measure(const CostKey& key, const Work& work, const Work& seconds,
               absl::Time now);

 private:
  // Least squares of seconds = rate * units.
  struct Rate {
    double products = 0;  // sum of units * seconds
    double squares = 0;   // sum of units^2
    double units_max = 0;

    void Add(double units, double seconds, double fade);
    double Estimate(double units, double extrapolation_max) const;
  };
  struct Entry {
    Rate linear;
    Rate quadratic;
    absl::Time measured;

    double Seconds(const Work& work) const;
  };
  using Entries = std::map<CostKey, Entry>;

  // The prediction of a key that has no entry.
  std::optional<Prediction> FromOtherRungs(const CostKey& key, const Work& work) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  Entries entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
