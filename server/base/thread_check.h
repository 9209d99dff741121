// Whether the system has room for the threads that a server needs.
//
// gRPC does not report a thread that it could not make: the process waits for it for
// ever. So the room is tried at start, with threads that do nothing.
//
// Threading: call before the threads that it stands for start.
#pragma once

#include <cstdint>

#include "absl/status/status.h"

namespace pbs::server {

// Has `count` threads at once for a moment. ResourceExhausted says which one the system
// refused, and what to raise.
absl::Status TryThreads(int32_t count);

}  // namespace pbs::server
