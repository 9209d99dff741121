// One device of a node: its backend, its memory, its engine, its replicas of the
// models.
//
// Threading: one thread creates and prepares it; engine() and health() are safe from
// any thread.
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
#include "server/engine/device_engine.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

class Device {
 public:
  // Objects that the devices of a node share. Borrowed.
  struct Shared {
    ByteLedger& ledger;  // ledger of host memory
    const Clock& clock;
    TimerQueue& timers;
    ServerMetrics& metrics;
    CostModel& costs;
    Log& log;
  };

  // `number` counts the node's devices from 0.
  Device(int32_t number, std::unique_ptr<Backend> backend,
         const ServerSettings& settings, const Shared& shared);

  Backend& backend() const { return *backend_; }
  DeviceEngine& engine() { return engine_; }
  // Its name in metrics and logs: the number.
  std::string name() const { return std::to_string(number_); }
  bool has_memory() const { return ledger_.has_value(); }
  int64_t bytes_max() const { return ledger_ ? ledger_->bytes_max() : 0; }
  int64_t bytes_held() const { return ledger_ ? ledger_->bytes_held() : 0; }

  absl::Status RunSelfTest() const;

  // Loads a replica. Cancelled when `stop` is set meanwhile; other errors name model
  // and reason.
  absl::StatusOr<std::unique_ptr<Model>> LoadModel(const ModelSettings& source,
                                                   const std::atomic<bool>& stop);
  // Logs the memory of the longest prompt, part by part, and the longest prompt that
  // fits. Call it when all models are loaded.
  void LogMemoryPlan(const ModelSettings& source, const Model& model) const;

 private:
  // Takes the weights out of the budget of requests.
  absl::Status WithholdWeights(const Model& model);
  // Refuses a model for which this backend cannot run any prompt.
  absl::Status CheckThatItRuns(const Model& model) const;

  const int32_t number_;
  const ServerSettings& settings_;
  const Shared shared_;
  const std::unique_ptr<Backend> backend_;
  std::optional<ByteLedger> ledger_;  // none where device memory is ordinary memory
  DeviceEngine engine_;
};

// The longest prompt that the server accepts for a model.
int32_t TokensMax(const ModelSettings& source, const Model& model,
                  const ServiceLimits& limits);

}  // namespace pbs::server
