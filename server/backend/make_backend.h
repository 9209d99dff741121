// Creates the backends of the settings, one for each device.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "pbs/backend.h"
#include "server/base/log.h"
#include "server/config/server_settings.h"

namespace pbs::server {

// At least one backend. "cuda": one on every device in the settings, or
// FailedPrecondition with the reason. "auto": as "cuda", or else the CPU and one log
// line with the reason.
absl::StatusOr<std::vector<std::unique_ptr<Backend>>> MakeBackends(
    const ServerSettings& settings, Log& log);

}  // namespace pbs::server
