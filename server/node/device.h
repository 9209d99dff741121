// One device of a node: its backend, its memory, its engine, its replicas of the
// models.
//
// Threading: one thread makes and prepares it; engine() and health() are safe from any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pbs/backend.h"
#include "server/base/clock.h"
#include "server/base/log.h"
#include "server/base/timers.h"
#include "server/config/server_settings.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/cost_model.h"
#include "server/engine/engine_impl.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

class Device {
 public:
  // What the devices of a node share. Borrowed.
  struct Shared {
    ByteLedger& ledger;  // of host memory
    const Clock& clock;
    TimerQueue& timers;
    ServerMetrics& metrics;
    CostModel& costs;
    Log& log;
  };

  // `number` among the node's devices, from 0 on.
  Device(int32_t number, std::unique_ptr<Backend> backend,
         const ServerSettings& settings, const Shared& shared);

  Backend& backend() const { return *backend_; }
  EngineImpl& engine() { return engine_; }
  // As metrics and logs call it: its number.
  std::string name() const { return std::to_string(number_); }
  bool has_memory() const { return ledger_.has_value(); }
  int64_t bytes_max() const { return ledger_ ? ledger_->bytes_max() : 0; }
  int64_t bytes_held() const { return ledger_ ? ledger_->bytes_held() : 0; }

  absl::Status RunSelfTest() const;

  // Loads a replica. Cancelled when `stop` is set meanwhile; FailedPrecondition and
  // others name model and reason.
  absl::StatusOr<std::unique_ptr<Model>> LoadModel(const ModelSettings& source,
                                                   const std::atomic<bool>& stop);
  // When all models are loaded: what the longest prompt would take, part by part, and
  // the longest that fits.
  void LogMemoryPlan(const ModelSettings& source, const Model& model) const;

 private:
  // Weights are no request's.
  absl::Status WithholdWeights(const Model& model);
  // What this backend cannot run for anybody must not be served.
  absl::Status CheckThatItRuns(const Model& model) const;

  const int32_t number_;
  const ServerSettings& settings_;
  const Shared shared_;
  const std::unique_ptr<Backend> backend_;
  std::optional<ByteLedger> ledger_;  // none where device memory is ordinary memory
  EngineImpl engine_;
};

// The longest prompt that the server takes for a model.
int32_t TokensMax(const ModelSettings& source, const Model& model,
                  const ServiceLimits& limits);

}  // namespace pbs::server
