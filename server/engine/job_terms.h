// On what terms a job runs, and what the engine says when it accepts one.
//
// Threading: values.
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace pbs::server {

using JobId = uint64_t;

// Why a job is cancelled from outside.
enum class CancelReason : uint8_t {
  kCaller,    // it completes with CANCELLED
  kDeadline,  // with DEADLINE_EXCEEDED: the caller's clock was ahead of ours
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
