// The deadline of a call, and whether it is what ended the call.
//
// A caller's clock ends a call too, and may do so a little before the server's: its
// time-out travels rounded up, and the request may have been longer under way than the
// news that the call is over. Such an end is the deadline's all the same.
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
  // Whether the deadline is why a call ends that its caller ends at `now`.
  bool Ends(absl::Time now) const { return now >= ends_from_; }

 private:
  // Never sooner than after half of the call's time.
  static absl::Time EndsFrom(absl::Time begin, absl::Time deadline) {
    if (deadline == absl::InfiniteFuture()) return deadline;
    const absl::Duration whole = std::max(deadline - begin, absl::ZeroDuration());
    return deadline - std::min(kTransitMax + kRoundingShareMax * whole, whole / 2);
  }

  absl::Time time_;
  absl::Time ends_from_;
};

// How a call that ends with `status` cancels its job.
inline CancelReason CancelReasonOf(const absl::Status& status) {
  return absl::IsDeadlineExceeded(status) ? CancelReason::kDeadline
                                          : CancelReason::kCaller;
}

}  // namespace pbs::server
