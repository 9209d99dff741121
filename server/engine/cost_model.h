// How long will it take? Learned from what was measured.
//
// A request's work has a part that grows with its tokens and a part that grows with
// their square. Both are timed apart, so each has a rate of its own: seconds per unit,
// by least squares through the origin over all measurements, where older ones fade with
// the seconds of work that were measured since. Large requests thus weigh more than
// small ones, whose fixed costs would mislead, and a flood of small ones does not wash
// a large one out.
//
// Threading: safe from any thread. Memory: one entry per key; keys come from the models
// and the enums.
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

// Work that is alike but for its size.
struct CostKey {
  const void* model = nullptr;  // null for raw attention
  Method method = Method::kDense;
  DType dtype = DType::kF32;
  int32_t head_dim = 0;

  auto operator<=>(const CostKey&) const = default;
};

// Units are the caller's, the same for every call with one key: tokens and tokens^2 for
// a prefill, 0 and multiply-adds for raw attention.
struct Work {
  double linear = 0;
  double quadratic = 0;
};

struct Prediction {
  double seconds = 0;
  // Measured lately: a refusal may rest on it. Otherwise one request should be let
  // through, or a node that was slow once would refuse for ever.
  bool fresh = false;
};

class CostModel {
 public:
  // A request of more than this many times the longest measured length is predicted as
  // if it were that long: a lower bound, since nothing is known about it.
  static constexpr double kExtrapolatedLengthsMax = 4;
  static constexpr absl::Duration kFreshTime = absl::Minutes(1);

  // None until something with this key was measured.
  std::optional<Prediction> Predict(const CostKey& key, const Work& work,
                                    absl::Time now) const;

  // `seconds` hold what `work` took, part by part.
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
  };

  mutable Mutex mutex_;
  std::map<CostKey, Entry> entries_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
