// Budgets of memory that requests may hold, in bytes.
#pragma once

#include <cstdint>

#include "pbs/backend.h"
#include "server/config/server_settings.h"

namespace pbs::server {

// Budget of ordinary memory: the setting. Without one: half of the process's memory
// limit, or most of what the models' files leave of that limit when this is less.
int64_t MemoryBudget(const ServerSettings& settings);

// Budget of a device's own memory: the setting, or without one most of its free memory,
// to which weights are charged.
int64_t DeviceBudget(const CudaSettings& settings, const Backend& backend);

}  // namespace pbs::server
