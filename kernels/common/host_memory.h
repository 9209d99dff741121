// Pages directly from the operating system. A buffer's destructor returns them, so that
// large workspaces and caches do not stay in an allocator.
//
// Threading: safe from any thread.
#pragma once

#include <cstdint>
#include "pbs/backend.h"
#include "pbs/status.h"

namespace pbs {

// Zeroed and page-aligned; 0 bytes give an empty buffer. Buffers of at least a few huge
// pages request huge pages. ResourceExhausted names the refused size.
StatusOr<Buffer> AllocatePages(int64_t bytes);

}  // namespace pbs
