// File descriptors: how many this process may have.
//
// Threading: safe from any thread.
#pragma once

#include <cstdint>

namespace pbs::server {

// Open at the moment.
int64_t OpenDescriptors();

// Raises the soft limit to `wanted` where it is lower, as far as the hard limit lets
// it; never lowers it. Returns the soft limit.
int64_t RaiseDescriptorLimit(int64_t wanted);

}  // namespace pbs::server
