// What requests may hold.
#pragma once

#include <cstdint>

#include "pbs/backend.h"
#include "server/config/server_settings.h"

namespace pbs::server {

// Of ordinary memory: what the settings say, or half of what this process may use, or
// most of what the models' files leave of it when that is less.
int64_t MemoryBudget(const ServerSettings& settings);

// Of a device's own memory: what the settings say, or most of what is free; weights are
// then charged to it.
int64_t DeviceBudget(const CudaSettings& settings, const Backend& backend);

}  // namespace pbs::server
