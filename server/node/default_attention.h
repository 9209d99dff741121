// Which of the possible default attentions a server has.
//
// Threading: stateless.
#pragma once

#include "pbs/backend.h"
#include "server/config/server_settings.h"

namespace pbs::server {

// `settings` with the first of settings.default_attentions that `backend` runs as
// service.default_attention; unchanged when it runs none, so that loading a model says
// what is missing.
ServerSettings WithDefaultAttention(const ServerSettings& settings,
                                    const Backend& backend);

}  // namespace pbs::server
