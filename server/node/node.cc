#include "server/node/node.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/backend/make_backend.h"
#include "server/backend/memory_budget.h"
#include "server/base/advertise.h"
#include "server/base/descriptors.h"
#include "server/base/host_port.h"
#include "server/base/mutex.h"
#include "server/base/process.h"
#include "server/base/random_id.h"
#include "server/base/shared_region.h"
#include "server/base/status.h"
#include "server/config/profile_file.h"
#include "server/model/prefill_plan.h"
#include "server/node/default_attention.h"

namespace pbs::server {
namespace {

// For gRPC's own, model files and the metrics' connections.
constexpr int64_t kDescriptorsForOthers = 128;
constexpr absl::Duration kTrimInterval = absl::Seconds(5);
constexpr int64_t kTrimBytesMin = 32 << 20;  // resident since the last time

std::vector<DeviceEngine*> EnginesOf(
    const std::vector<std::unique_ptr<Device>>& devices) {
  std::vector<DeviceEngine*> engines;
  for (const auto& device : devices) engines.push_back(&device->engine());
  return engines;
}

// Whether this backend and this system can hold caches in shared memory.
absl::Status CheckSharing(const ServerSettings& settings, const Backend& backend) {
  const std::string& path = settings.shared_memory_socket;
  if (path.empty()) return absl::OkStatus();
  const std::string field = absl::StrCat("shared_memory_socket \"", path, "\" ");
  if (!backend.info().host_memory) {
    return absl::FailedPreconditionError(absl::StrCat(field, kSharedMemoryNeedsCpu));
  }
  const auto probe = SharedRegion::Create(1);
  if (probe.ok() && (*probe)->OpenReadOnly().ok()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(field, "needs sealed shared memory and /proc: ",
                   probe.ok() ? (*probe)->OpenReadOnly().status().message()
                              : probe.status().message()));
}

// A cache in shared memory has a descriptor, and the socket has its connections.
int64_t DescriptorsToShare(const ServerSettings& settings) {
  if (settings.shared_memory_socket.empty()) return 0;
  return int64_t{settings.leases.leases_max} +
         settings.service.limits.queue_requests_max +
         2 * RegionServerOptions().connections_max;
}

}  // namespace

Node::Node(const ServerSettings& settings, const BuildLabels& build,
           std::vector<std::unique_ptr<Backend>> backends, SignalWatcher& signals,
           Log& log)
    : settings_(settings),
      build_(build),
      signals_(signals),
      log_(log),
      ledger_(MemoryBudget(settings)),
      devices_(MakeDevices(std::move(backends))),
      engine_(EnginesOf(devices_), metrics_.engine),
      leases_(settings.leases, RandomU64(), clock_, timers_, metrics_.kv) {
  metrics_.SetBuildInfo(build_);
}

std::vector<std::unique_ptr<Device>> Node::MakeDevices(
    std::vector<std::unique_ptr<Backend>> backends) {
  std::vector<std::unique_ptr<Device>> devices;
  for (auto& backend : backends) {
    devices.push_back(std::make_unique<Device>(
        static_cast<int32_t>(devices.size()), std::move(backend), settings_,
        Device::Shared{ledger_, clock_, timers_, metrics_, costs_, log_}));
  }
  return devices;
}

absl::StatusOr<std::unique_ptr<Node>> Node::Create(const ServerSettings& settings,
                                                   const BuildLabels& build,
                                                   SignalWatcher& signals, Log& log) {
  PBS_ABSL_ASSIGN_OR_RETURN(auto backends, MakeBackends(settings, log));
  PBS_ABSL_RETURN_IF_ERROR(CheckSharing(settings, *backends.front()));
  const ServerSettings chosen = WithDefaultAttention(settings, *backends.front());
  auto node =
      std::unique_ptr<Node>(new Node(chosen, build, std::move(backends), signals, log));
  PBS_ABSL_RETURN_IF_ERROR(node->Listen());
  PBS_ABSL_RETURN_IF_ERROR(node->ShareCaches());
  PBS_ABSL_RETURN_IF_ERROR(node->ExportMetrics());
  return node;
}

// ---- start

ServiceOptions Node::MakeServiceOptions() const {
  const BackendInfo& info = devices_.front()->backend().info();
  const std::string count =
      devices_.size() == 1 ? "" : absl::StrCat(devices_.size(), " x ");
  ServiceOptions options = settings_.service;
  options.version = build_.version;
  options.commit = build_.commit;
  options.backend.name = info.name;
  options.backend.isa = info.isa;
  options.backend.device =
      absl::StrCat(count, info.device, ", ", info.num_threads, " threads");
  options.backend.head_dims = info.head_dims;
  options.backend.dtypes = info.dtypes;
  options.backend.methods = info.methods;
  return options;
}

absl::Status Node::LimitConnections(TransportOptions& transport) const {
  const int64_t others = OpenDescriptors() + kDescriptorsForOthers +
                         static_cast<int64_t>(settings_.service.push_targets.size()) +
                         DescriptorsToShare(settings_);
  const int64_t wanted = others + transport.connections_max;
  const int64_t limit = RaiseDescriptorLimit(wanted);
  if (limit >= wanted) return absl::OkStatus();
  if (limit <= others) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the limit of ", limit, " file descriptors leaves none for connections; ",
        others, " are for other uses; raise the hard limit (ulimit -Hn) to ", wanted));
  }
  log_.Warning(
      "connections_limited",
      {{"connections_max", limit - others},
       {"connections_max_configured", transport.connections_max},
       {"descriptors_max", limit},
       {"note", absl::StrCat("raise the hard limit of descriptors (ulimit -Hn) "
                             "to ",
                             wanted)}});
  transport.connections_max = static_cast<int32_t>(limit - others);
  return absl::OkStatus();
}

absl::Status Node::Listen() {
  ServiceOptions options = MakeServiceOptions();
  PBS_ABSL_RETURN_IF_ERROR(LimitConnections(options.transport));
  PBS_ABSL_ASSIGN_OR_RETURN(
      server_, GrpcServer::Create(options, {engine_, leases_, ledger_, metrics_, log_,
                                            clock_, timers_}));
  const char* const pod_ip = std::getenv(kPodIpVariable);
  PBS_ABSL_ASSIGN_OR_RETURN(
      std::string endpoint,
      AdvertisedEndpoint(settings_.advertise, pod_ip == nullptr ? "" : pod_ip,
                         settings_.service.listen, server_->port()));
  leases_.SetEndpoint(std::move(endpoint));
  timer_thread_ = std::make_unique<TimerThread>(timers_);
  for (const std::string& address :
       {settings_.service.listen, settings_.metrics_listen}) {
    if (address.empty() || ParseHostPort(address)->IsLoopback()) continue;
    log_.Warning("listening_beyond_loopback",
                 {{"address", address}, {"note", "no encryption, no authentication"}});
  }
  return absl::OkStatus();
}

absl::Status Node::ShareCaches() {
  if (settings_.shared_memory_socket.empty()) return absl::OkStatus();
  PBS_ABSL_ASSIGN_OR_RETURN(
      region_server_, RegionServer::Create({.path = settings_.shared_memory_socket},
                                           leases_, metrics_.kv));
  return absl::OkStatus();
}

std::shared_ptr<prometheus::Collectable> Node::DeviceGauge(
    const MetricName& metric, double (*value)(Device&)) const {
  return std::make_shared<SampledGauge>(metric, [this, value] {
    SampledGauge::Values values;
    for (const auto& device : devices_) {
      values.emplace_back(device->name(), value(*device));
    }
    return values;
  });
}

absl::Status Node::ExportMetrics() {
  if (settings_.metrics_listen.empty()) return absl::OkStatus();
  std::vector<std::shared_ptr<prometheus::Collectable>> sources = {
      registry_, std::make_shared<ProcessMetrics>(),
      std::make_shared<SampledGauge>(
          kMemoryChargedName, [this]() -> SampledGauge::Values {
            return {{"", static_cast<double>(ledger_.bytes_held())}};
          })};
  sources.push_back(DeviceGauge(kDeviceBacklogName, [](Device& device) {
    return device.engine().load().backlog.seconds;
  }));
  sources.push_back(DeviceGauge(kDeviceProgressName, [](Device& device) {
    return device.engine().load().backlog.progress_age_seconds;
  }));
  if (devices_.front()->has_memory()) {
    sources.push_back(DeviceGauge(kDeviceMemoryName, [](Device& device) {
      return static_cast<double>(device.bytes_held());
    }));
  }
  if (settings_.vllm_metrics) {
    const bool one_model = settings_.models.size() == 1;
    sources.push_back(std::make_shared<VllmMetrics>(
        *registry_, one_model ? settings_.models.front().name : "all"));
  }
  PBS_ABSL_ASSIGN_OR_RETURN(
      metrics_server_,
      MetricsServer::Create(settings_.metrics_listen, std::move(sources)));
  return absl::OkStatus();
}

absl::Status Node::LoadModel(const ModelSettings& source) {
  auto served = std::make_unique<ServedModel>();
  served->name = source.name;
  for (const auto& device : devices_) {
    PBS_ABSL_ASSIGN_OR_RETURN(std::unique_ptr<Model> model,
                              device->LoadModel(source, signals_.stop_flag()));
    if (!served->replicas.empty() && model->digest() != served->model().digest()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "model ", source.name, ": its files changed while it was loaded"));
    }
    served->replicas.push_back(std::move(model));
  }
  served->tokens_max = TokensMax(source, served->model(), settings_.service.limits);
  PBS_ABSL_RETURN_IF_ERROR(LoadProfiles(source, *served));
  models_.push_back(std::move(served));
  return absl::OkStatus();
}

absl::Status Node::LoadProfiles(const ModelSettings& source,
                                ServedModel& served) const {
  const Model& model = served.model();
  const ModelConfig& config = model.config();
  const ProfiledModel facts = {.digest = model.digest(),
                               .num_layers = config.num_layers,
                               .num_heads = config.num_heads,
                               .num_kv_heads = config.num_kv_heads,
                               .head_dim = config.head_dim};
  for (const std::string& path : source.profiles) {
    const auto failed = [&](const absl::Status& status) {
      return absl::Status(status.code(),
                          absl::StrCat("model ", source.name, ": ", status.message()));
    };
    absl::StatusOr<Profile> profile = LoadProfile(path, facts);
    if (!profile.ok()) return failed(profile.status());
    for (const Profile& other : served.profiles) {
      if (other.name != profile->name) continue;
      return failed(absl::InvalidArgumentError(
          absl::StrCat("profile ", path, ": name \"", profile->name,
                       "\" is taken by an earlier profile; names are unique")));
    }
    // Whether the backend has what the profile asks for.
    const auto plan =
        ToAbsl(PlanPrefill(model, {.num_tokens = 1,
                                   .attention = profile->options,
                                   .head_thresholds = profile->head_thresholds}));
    if (!plan.ok()) {
      return failed({plan.status().code(),
                     absl::StrCat("profile ", path, ": ", plan.status().message())});
    }
    log_.Info("profile_loaded",
              {{"model", source.name},
               {"profile", profile->name},
               {"method", MethodName(profile->options.method)},
               {"thresholds", static_cast<int64_t>(profile->head_thresholds.size())},
               {"path", path}});
    served.profiles.push_back(*std::move(profile));
  }
  return absl::OkStatus();
}

absl::Status Node::Prepare() {
  for (const auto& device : devices_) {
    PBS_ABSL_RETURN_IF_ERROR(device->RunSelfTest());
  }
  std::vector<const ServedModel*> models;
  for (const ModelSettings& source : settings_.models) {
    PBS_ABSL_RETURN_IF_ERROR(LoadModel(source));
    models.push_back(models_.back().get());
  }
  for (size_t i = 0; i < models_.size(); ++i) {
    for (size_t device = 0; device < devices_.size(); ++device) {
      devices_[device]->LogMemoryPlan(settings_.models[i],
                                      *models_[i]->replicas[device]);
    }
  }
  for (const auto& device : devices_) {
    executor_threads_.push_back(std::make_unique<ExecutorThread>(
        device->engine().executor(), [this] { StopIfADeviceIsLost(); }));
  }
  server_->SetModels(std::move(models));
  return absl::OkStatus();
}

// ---- serving

void Node::LogServing() const {
  const BackendInfo& info = devices_.front()->backend().info();
  const auto bound = [](const std::string& listen, int port) {
    return HostPort{ParseHostPort(listen)->host, port}.ToString();
  };
  const std::string address = bound(settings_.service.listen, server_->port());
  const std::string metrics =
      metrics_server_ == nullptr
          ? "off"
          : bound(settings_.metrics_listen, metrics_server_->port());
  const std::string models = absl::StrJoin(
      models_, ",", [](std::string* out, const auto& model) { *out += model->name; });
  log_.Info("serving", {{"listen", address},
                        {"endpoint", leases_.endpoint()},
                        {"metrics", metrics},
                        {"shared_memory_socket", settings_.shared_memory_socket},
                        {"models", models},
                        {"backend", info.name},
                        {"isa", info.isa},
                        {"device", info.device},
                        {"devices", devices_.size()},
                        {"threads", info.num_threads},
                        {"bf16_speedup", info.bf16_speedup},
                        {"memory_bytes_max", ledger_.bytes_max()},
                        {"device_bytes_max", devices_.front()->bytes_max()},
                        {"epoch", leases_.epoch()},
                        {"version", build_.version},
                        {"commit", build_.commit}});
  std::printf("pbs-prefilld %s serving on %s, metrics %s, models %s, %s %s x%d\n",
              build_.version.c_str(), address.c_str(), metrics.c_str(),
              models.empty() ? "none (raw attention only)" : models.c_str(),
              info.name.c_str(), info.isa.c_str(), info.num_threads);
  std::fflush(stdout);
}

// A device may be lost while nothing runs.
void Node::WatchDevices() {
  constexpr absl::Duration kInterval = absl::Seconds(5);
  StopIfADeviceIsLost();
  if (!device_lost()) timers_.At(clock_.Now() + kInterval, [this] { WatchDevices(); });
}

// The allocator keeps what was freed: after a thousand unread fetches, a gigabyte.
void Node::TrimWhenIdle() {
  const int64_t resident = ResidentBytes();
  if (server_->IsIdle() && resident > resident_after_trim_ + kTrimBytesMin) {
    ReturnFreedMemory();
    resident_after_trim_ = ResidentBytes();
  }
  timers_.At(clock_.Now() + kTrimInterval, [this] { TrimWhenIdle(); });
}

// The other devices could go on. But the operator must learn of the loss, and a restart
// brings the device back or says why not.
void Node::StopIfADeviceIsLost() {
  for (const auto& device : devices_) {
    const pbs::Status health = device->backend().Health();
    if (health.ok() || device_lost_.exchange(true)) continue;
    log_.Error("device_lost",
               {{"device", device->name()}, {"message", health.message()}});
    server_->SetServing(false);
    signals_.RequestStop();
  }
}

void Node::Serve() {
  server_->SetServing(true);
  if (devices_.front()->has_memory()) WatchDevices();
  timers_.At(clock_.Now() + kTrimInterval, [this] { TrimWhenIdle(); });
  LogServing();
  signals_.WaitForStop();
}

// ---- end

bool Node::WaitFor(absl::Time until,
                   absl::FunctionRef<void(absl::AnyInvocable<void()>)> start) {
  // shared_ptr: the callback may come after the wait was given up.
  struct Event {
    Mutex mutex;
    CondVar changed;
    bool happened ABSL_GUARDED_BY(mutex) = false;
  };
  const auto event = std::make_shared<Event>();
  start([event] {
    MutexLock lock(event->mutex);
    event->happened = true;
    event->changed.NotifyAll();
  });
  MutexLock lock(event->mutex);
  while (!event->happened && clock_.Now() < until) {
    event->changed.WaitFor(event->mutex, absl::ToDoubleSeconds(until - clock_.Now()));
  }
  return event->happened;
}

bool Node::FinishWork(absl::Time until) {
  const bool idle =
      WaitFor(until, [this](auto done) { server_->Drain(std::move(done)); }) &&
      WaitFor(until, [this](auto done) { engine_.Drain(std::move(done)); });
  if (idle) return true;
  // Uploads first: one that becomes a job meanwhile is still seen.
  const int32_t uploads = server_->CutUploads();
  const int32_t jobs = engine_.Shutdown();
  // The last job may have been about to give back what it held.
  if (jobs + uploads == 0) return true;
  log_.Warning("drain_cut", {{"jobs", jobs}, {"uploads", uploads}});
  return false;
}

bool Node::Drain() {
  // Replies that are ready deserve a moment to be read, however long the drain took.
  constexpr absl::Duration kLastRepliesMin = absl::Seconds(1);
  const absl::Time begin = clock_.Now();
  const absl::Time until = begin + settings_.drain_max;
  log_.Info("draining", {{"leases", leases_.size()},
                         {"seconds_max", absl::ToDoubleSeconds(settings_.drain_max)}});
  server_->SetServing(false);
  const bool finished = FinishWork(until);
  const bool released =
      WaitFor(until, [this](auto done) { leases_.WhenEmpty(std::move(done)); });
  server_->Shutdown(std::max(kLastRepliesMin, until - clock_.Now()));
  log_.Info("drained", {{"work_finished", finished},
                        {"leases_released", released},
                        {"seconds", absl::ToDoubleSeconds(clock_.Now() - begin)}});
  return finished;
}

}  // namespace pbs::server
