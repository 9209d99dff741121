// A gauge whose value is the sum of the values of several parts of the server.
//
// Threading: safe from any thread.
#pragma once

#include <cstddef>
#include <numeric>
#include <vector>

#include "prometheus/gauge.h"
#include "server/base/mutex.h"

namespace pbs::server {

class SummedGauge {
 public:
  explicit SummedGauge(prometheus::Gauge& gauge) : gauge_(gauge) {}

  // Sets the value of a part. Parts are numbered from 0.
  void Set(size_t part, double value) {
    MutexLock lock(mutex_);
    if (part >= values_.size()) values_.resize(part + 1);
    values_[part] = value;
    gauge_.Set(std::accumulate(values_.begin(), values_.end(), 0.0));
  }
  double Value() const { return gauge_.Value(); }

 private:
  prometheus::Gauge& gauge_;
  Mutex mutex_;
  std::vector<double> values_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
