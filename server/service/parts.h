// Objects that the service uses.
#pragma once

#include "server/base/clock.h"
#include "server/base/log.h"
#include "server/base/timers.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/engine.h"
#include "server/telemetry/server_metrics.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

// Borrowed; all must outlive the server.
struct ServiceParts {
  Engine& engine;
  LeaseStore& leases;
  ByteLedger& ledger;  // the engine's
  ServerMetrics& metrics;
  Log& log;
  const Clock& clock;
  TimerQueue& timers;
};

}  // namespace pbs::server
