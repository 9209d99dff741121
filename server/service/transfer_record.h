// Metrics of one KV transfer, inline or by fetch.
//
// Threading: one thread at a time.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/time/time.h"
#include "server/service/parts.h"

namespace pbs::server {

class TransferRecord {
 public:
  explicit TransferRecord(const ServiceParts& parts) : parts_(parts) {}

  // A chunk is handed to the transport.
  void AddChunk(size_t bytes) {
    if (!start_.has_value()) start_ = parts_.clock.Now();
    parts_.metrics.kv.transfer_bytes.Increment(static_cast<double>(bytes));
  }
  // The last chunk is gone. Returns the seconds since the first.
  double Complete() {
    const double seconds =
        start_.has_value() ? absl::ToDoubleSeconds(parts_.clock.Now() - *start_) : 0;
    parts_.metrics.kv.transfer_time.Observe(seconds);
    return seconds;
  }
  void Fail(TransferFailure reason) {
    parts_.metrics.kv.TransferFailed(reason).Increment();
  }

 private:
  const ServiceParts& parts_;
  std::optional<absl::Time> start_;
};

}  // namespace pbs::server
