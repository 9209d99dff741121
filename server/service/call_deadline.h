// The deadline of a call, and the test whether the deadline ended the call.
//
// The caller's clock also ends a call, perhaps shortly before the server's clock would:
// gRPC sends time-outs rounded up, and the request may have taken longer to arrive than
// the cancellation. Such an end counts as DEADLINE_EXCEEDED.
//
// Threading: values. Memory: none.
#pragma once

#include <algorithm>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/engine/job_terms.h"

namespace pbs::server {

class CallDeadline {
 public:
  // gRPC rounds time-outs up to two or three digits.
  static constexpr double kRoundingShareMax = 0.01;
  static constexpr absl::Duration kTransitMax = absl::Milliseconds(100);

  // InfiniteFuture: none.
  CallDeadline(absl::Time begin, absl::Time deadline)
      : time_(deadline), ends_from_(EndsFrom(begin, deadline)) {}

  absl::Time time() const { return time_; }
  // True when a call that its caller ends at `now` ends because of the deadline.
  bool Ends(absl::Time now) const { return now >= ends_from_; }

 private:
  // Never before half of the call's time has passed.
  static absl::Time EndsFrom(absl::Time begin, absl::Time deadline) {
    if (deadline == absl::InfiniteFuture()) return deadline;
    const absl::Duration whole = std::max(deadline - begin, absl::ZeroDuration());
    return deadline - std::min(kTransitMax + kRoundingShareMax * whole, whole / 2);
  }

  absl::Time time_;
  absl::Time ends_from_;
};

// The reason with which a call that ends with `status` cancels its job.
inline CancelReason CancelReasonOf(const absl::Status& status) {
  return absl::IsDeadlineExceeded(status) ? CancelReason::kDeadline
                                          : CancelReason::kCaller;
}

}  // namespace pbs::server
