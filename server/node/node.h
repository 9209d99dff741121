// A running server: devices, models, queue, leases, services and metrics.
//
//   Create -> Prepare -> Serve (until asked to stop) -> Drain
//
// Threading: one thread. Errors: those of Create() and Prepare() are messages for the
// operator.
#pragma once

#include <prometheus/registry.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/clock.h"
#include "server/base/log.h"
#include "server/base/signal_watcher.h"
#include "server/base/timers.h"
#include "server/config/server_settings.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/cost_model.h"
#include "server/engine/replicated_engine.h"
#include "server/node/device.h"
#include "server/service/server.h"
#include "server/telemetry/metrics_server.h"
#include "server/telemetry/process_metrics.h"
#include "server/telemetry/sampled_metrics.h"
#include "server/telemetry/server_metrics.h"
#include "server/transfer/lease_store.h"
#include "server/transfer/region_server.h"

namespace pbs::server {

class Node {
 public:
  // Creates the backends and listens. Nothing is served yet.
  static absl::StatusOr<std::unique_ptr<Node>> Create(const ServerSettings& settings,
                                                      const BuildLabels& build,
                                                      SignalWatcher& signals, Log& log);

  // Runs the self-tests, then loads the models. Cancelled when asked to stop meanwhile.
  absl::Status Prepare();
  // Logs that it serves, and serves until asked to stop.
  void Serve();
  // Finishes admitted work and serves leases, for at most the configured time. False
  // when that time was too short for the work.
  bool Drain();
  bool device_lost() const { return device_lost_.load(); }

 private:
  Node(const ServerSettings& settings, const BuildLabels& build,
       std::vector<std::unique_ptr<Backend>> backends, SignalWatcher& signals,
       Log& log);
  std::vector<std::unique_ptr<Device>> MakeDevices(
      std::vector<std::unique_ptr<Backend>> backends);
  // Raises the descriptor limit for the connections, or lowers their number to that
  // limit.
  absl::Status LimitConnections(TransportOptions& transport) const;
  absl::Status Listen();
  absl::Status ShareCaches();
  absl::Status ExportMetrics();
  // A gauge with one value per device.
  std::shared_ptr<prometheus::Collectable> DeviceGauge(const MetricName& metric,
                                                       double (*value)(Device&)) const;
  absl::Status LoadModel(const ModelSettings& source);
  absl::Status LoadProfiles(const ModelSettings& source, ServedModel& served) const;
  ServiceOptions MakeServiceOptions() const;
  void LogServing() const;
  void WatchDevices();
  // Returns freed memory to the system while no call is open.
  void TrimWhenIdle();
  void StopIfADeviceIsLost();
  // Waits for admitted work until `until` and then ends the rest; true when all was
  // done.
  bool FinishWork(absl::Time until);
  // Calls `start` with a callback and waits until the callback is called; false when
  // `until` came first.
  bool WaitFor(absl::Time until,
               absl::FunctionRef<void(absl::AnyInvocable<void()>)> start);

  const ServerSettings settings_;
  const BuildLabels build_;
  SignalWatcher& signals_;
  Log& log_;
  const RealClock clock_;
  TimerQueue timers_{clock_};
  // shared_ptr: the interface of the metrics exposer requires it.
  const std::shared_ptr<prometheus::Registry> registry_ =
      std::make_shared<prometheus::Registry>();
  ServerMetrics metrics_{*registry_};
  CostModel costs_;
  ByteLedger ledger_;
  std::atomic<bool> device_lost_ = false;
  int64_t resident_after_trim_ = 0;  // used by the timer thread only
  const std::vector<std::unique_ptr<Device>> devices_;
  std::vector<std::unique_ptr<ServedModel>> models_;
  ReplicatedEngine engine_;
  LeaseStore leases_;
  std::unique_ptr<RegionServer> region_server_;  // with shared_memory_socket
  std::unique_ptr<MetricsServer> metrics_server_;
  std::unique_ptr<GrpcServer> server_;
  // Threads are the last members, so that they stop first.
  std::unique_ptr<TimerThread> timer_thread_;
  std::vector<std::unique_ptr<ExecutorThread>> executor_threads_;
};

}  // namespace pbs::server
