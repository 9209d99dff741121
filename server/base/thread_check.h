// A check at start that the system grants the threads that a server needs.
//
// gRPC does not report a thread that it failed to create: the process waits for that
// thread forever. So the server first creates as many threads that do nothing.
//
// Threading: call before the server's other threads start.
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace pbs::server {

// Starts `count` threads at once and ends them. ResourceExhausted names the number of
// the refused thread and the limits to raise.
absl::Status TryThreads(int32_t count);

}  // namespace pbs::server
