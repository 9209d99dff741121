// Metrics of one KV transfer, inline, by fetch or by push.
//
// Threading: one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/service/service_context.h"

namespace pbs::server {

class TransferRecord {
 public:
  explicit TransferRecord(const ServiceContext& service)
      : service_(service), parts_(service.parts) {}

  // Call it when a chunk is passed to the transport.
  void AddChunk(size_t bytes) {
    if (!start_.has_value()) start_ = parts_.clock.Now();
    parts_.metrics.kv.transfer_bytes.Increment(static_cast<double>(bytes));
  }
  // Call it when the last chunk was sent. Returns the seconds since the first.
  double Complete() {
    const double seconds =
        start_.has_value() ? absl::ToDoubleSeconds(parts_.clock.Now() - *start_) : 0;
    parts_.metrics.kv.transfer_time.Observe(seconds);
    parts_.metrics.engine.StageTime(Stage::kSend).Observe(seconds);
    complete_ = true;
    return seconds;
  }
  // Call it when the call ends with `status`. It counts a failure when the transfer has
  // begun and is not complete.
  void Fail(const absl::Status& status) { Fail(ReasonOf(status)); }
  void Fail(TransferFailure reason) {
    if (!start_.has_value() || complete_) return;
    parts_.metrics.kv.TransferFailed(reason).Increment();
  }

 private:
  TransferFailure ReasonOf(const absl::Status& status) const {
    switch (status.code()) {
      case absl::StatusCode::kNotFound:
        return TransferFailure::kLeaseGone;
      case absl::StatusCode::kDeadlineExceeded:
        return TransferFailure::kDeadline;
      case absl::StatusCode::kUnavailable:
        return service_.stopping() ? TransferFailure::kShutdown
                                   : TransferFailure::kPrefillFailed;
      case absl::StatusCode::kInternal:
        return TransferFailure::kPrefillFailed;
      default:
        return TransferFailure::kCancelled;
    }
  }

  const ServiceContext& service_;
  const ServiceParts& parts_;
  bool complete_ = false;
  std::optional<absl::Time> start_;
};

}  // namespace pbs::server
