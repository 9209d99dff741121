// The backend that the settings ask for.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "pbs/backend.h"
#include "server/base/log.h"
#include "server/config/server_settings.h"

namespace pbs::server {

// cuda: FailedPrecondition says why there is none. auto: cuda, or the CPU and one line
// that says why.
absl::StatusOr<std::unique_ptr<Backend>> MakeBackend(const ServerSettings& settings,
                                                     Log& log);

}  // namespace pbs::server
