// Terms of a job, and the engine's answer when it accepts one.
//
// Threading: values.
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace pbs::server {

using JobId = uint64_t;

// The reason for cancelling a job.
enum class CancelReason : uint8_t {
  kCaller,  // the job completes with CANCELLED
  // The job completes with DEADLINE_EXCEEDED: the caller's clock was ahead of ours.
  kDeadline,
};

struct JobTerms {
  std::string request_id = {};                   // for logs
  absl::Time deadline = absl::InfiniteFuture();  // of the RPC
  int32_t priority = 0;                          // higher first; equal: arrival order
};

struct Admission {
  JobId id = 0;
  int32_t queue_position = 0;    // jobs ahead, the running one included
  double predicted_seconds = 0;  // until done; 0 without an estimate
};

}  // namespace pbs::server
