// The backends that the settings ask for, one for each device.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "pbs/backend.h"
#include "server/base/log.h"
#include "server/config/server_settings.h"

namespace pbs::server {

// At least one. cuda: on every device that is named, or FailedPrecondition says why
// not. auto: cuda, or the CPU and one line that says why.
absl::StatusOr<std::vector<std::unique_ptr<Backend>>> MakeBackends(
    const ServerSettings& settings, Log& log);

}  // namespace pbs::server
