// Pages straight from the operating system, given back to it when a buffer dies: large
// workspaces and caches must not linger in an allocator.
//
// Threading: safe from any thread.
#pragma once

#include <cstdint>
#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs {

// Zeroed and page-aligned; 0 bytes give an empty buffer. Buffers of a few huge pages
// and more ask for huge pages. ResourceExhausted names the size that was refused.
StatusOr<Buffer> AllocatePages(int64_t bytes);

}  // namespace pbs
