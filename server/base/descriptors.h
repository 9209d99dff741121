// The number of file descriptors of this process.
//
// Threading: safe from any thread.
#pragma once

#include <cstdint>

namespace pbs::server {

// Descriptors that are open at the moment.
int64_t OpenDescriptors();

// Raises the soft limit to `wanted`, or to the hard limit when that is less; never
// lowers it. Returns the soft limit.
int64_t RaiseDescriptorLimit(int64_t wanted);

}  // namespace pbs::server
