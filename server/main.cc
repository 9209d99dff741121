// pbs-prefilld: reads the configuration, builds the objects in the order in which they
// need each other, serves until SIGTERM or SIGINT, drains, exits.
//
// Exit status: 0 after a drain that finished all admitted work, 1 when the server could
// not start, the drain's limit cut work or the device was lost, 2 for a wrong command
// line or configuration.
#include <prometheus/registry.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/backend/make_backend.h"
#include "server/backend/memory_budget.h"
#include "server/base/clock.h"
#include "server/base/log.h"
#include "server/base/mutex.h"
#include "server/base/process.h"
#include "server/base/random_id.h"
#include "server/base/signal_watcher.h"
#include "server/base/status.h"
#include "server/base/timers.h"
#include "server/config/config_source.h"
#include "server/config/host_port.h"
#include "server/config/server_settings.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/engine_impl.h"
#include "server/engine/self_test.h"
#include "server/model/prefill_plan.h"
#include "server/service/server.h"
#include "server/telemetry/metrics_server.h"
#include "server/telemetry/sampled_metrics.h"
#include "server/telemetry/server_metrics.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {
namespace {

constexpr int kExitCut = 1;
constexpr int kExitUsage = 2;

// ---- the command line

struct Flags {
  std::string config;
  std::vector<std::string> sets;
  std::vector<std::string> models;  // NAME=PATH
  std::string listen;
  std::string metrics_listen;
  std::string backend;
  std::string log_level;
  std::string metrics_compat;
  std::optional<int32_t> threads;
  bool check_config = false;
};

void AddFlags(CLI::App& app, Flags& flags) {
  app.set_version_flag("--version", "pbs-prefilld " PBS_VERSION " (" PBS_COMMIT ")");
  app.add_option("--config", flags.config, "JSON file with a ServerConfig");
  app.add_option("--set", flags.sets, "PATH=VALUE on top of the file; repeatable")
      ->allow_extra_args(false);
  app.add_option("--model", flags.models, "NAME=PATH of a model folder; repeatable")
      ->allow_extra_args(false);
  app.option_defaults()->take_last();  // of the flags below
  app.add_option("--listen", flags.listen, "host:port [127.0.0.1:50051]");
  app.add_option("--metrics-listen", flags.metrics_listen,
                 "host:port [127.0.0.1:9464]; \"off\" for none");
  app.add_option("--backend", flags.backend, "auto, cpu or cuda [auto]");
  app.add_option("--threads", flags.threads,
                 "CPU threads; 0 = all this process may use");
  app.add_option("--log-level", flags.log_level,
                 "debug, info, warning or error [info]");
  app.add_option("--metrics-compat", flags.metrics_compat,
                 "vllm: also export vLLM's metric names")
      ->check(CLI::IsMember({"vllm"}));
  app.add_flag("--check-config", flags.check_config,
               "say whether the configuration is valid, and exit");
}

absl::Status AddModel(const std::string& flag, v1::ServerConfig& config) {
  const size_t equals = flag.find('=');
  if (equals == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model ", flag, " is not NAME=PATH"));
  }
  v1::ModelSource& model = *config.add_models();
  model.set_name(flag.substr(0, equals));
  model.set_path(flag.substr(equals + 1));
  return absl::OkStatus();
}

// The file, then --set, then the flags of their own.
absl::StatusOr<ServerSettings> ReadSettings(const Flags& flags) {
  v1::ServerConfig config;
  if (!flags.config.empty()) {
    PBS_ABSL_RETURN_IF_ERROR(LoadConfigFile(flags.config, config));
  }
  for (const std::string& set : flags.sets) {
    PBS_ABSL_RETURN_IF_ERROR(ApplySet(set, config));
  }
  for (const std::string& model : flags.models) {
    PBS_ABSL_RETURN_IF_ERROR(AddModel(model, config));
  }
  if (!flags.listen.empty()) config.set_listen(flags.listen);
  if (!flags.metrics_listen.empty()) {
    config.set_metrics_listen(flags.metrics_listen == "off" ? ""
                                                            : flags.metrics_listen);
  }
  if (!flags.backend.empty()) config.set_backend(flags.backend);
  if (!flags.log_level.empty()) config.mutable_log()->set_level(flags.log_level);
  if (!flags.metrics_compat.empty()) config.set_vllm_metrics(true);
  if (flags.threads.has_value()) config.mutable_cpu()->set_threads(*flags.threads);
  return MakeSettings(std::move(config));
}

// Empty where device memory is ordinary memory.
std::optional<ByteLedger> MakeDeviceLedger(const CudaSettings& settings,
                                           const Backend& backend) {
  if (backend.info().host_memory) return std::nullopt;
  return std::optional<ByteLedger>(std::in_place, DeviceBudget(settings, backend));
}

// ---- the node

// Everything a running server is made of, in the order of need.
class Node {
 public:
  static absl::StatusOr<std::unique_ptr<Node>> Create(const ServerSettings& settings,
                                                      SignalWatcher& signals, Log& log);

  // The self-test, then the models. Cancelled when asked to stop meanwhile.
  absl::Status Prepare();
  // Says so and serves until asked to stop.
  void Serve();
  // Finishes what was admitted and serves leases, for at most the configured time.
  // False when that was too short for the work.
  bool Drain();
  bool device_lost() const { return device_lost_.load(); }

 private:
  Node(const ServerSettings& settings, std::unique_ptr<Backend> backend,
       SignalWatcher& signals, Log& log);
  absl::Status Listen();
  absl::Status LoadModel(const ModelSettings& source);
  ServiceOptions MakeServiceOptions() const;
  void LogServing() const;
  void WatchDevice();
  void StopIfDeviceIsLost();
  // True when all admitted work was done before `until`; what is left then ends.
  bool FinishWork(absl::Time until);
  // Calls `start` with a callback and waits for that to be called; false when `until`
  // came first.
  bool WaitFor(absl::Time until,
               absl::FunctionRef<void(absl::AnyInvocable<void()>)> start);

  const ServerSettings settings_;
  SignalWatcher& signals_;
  Log& log_;
  const RealClock clock_;
  TimerQueue timers_{clock_};
  // shared_ptr: the exposer's interface asks for it.
  const std::shared_ptr<prometheus::Registry> registry_ =
      std::make_shared<prometheus::Registry>();
  ServerMetrics metrics_{*registry_};
  const std::unique_ptr<Backend> backend_;
  std::atomic<bool> device_lost_ = false;
  std::vector<std::unique_ptr<ServedModel>> models_;
  ByteLedger ledger_;
  std::optional<ByteLedger> device_ledger_;
  std::vector<ByteReservation> weights_;  // on the device
  EngineImpl engine_;
  LeaseStore leases_;
  std::unique_ptr<MetricsServer> metrics_server_;
  std::unique_ptr<GrpcServer> server_;
  // Threads last: they stop first.
  std::unique_ptr<TimerThread> timer_thread_;
  std::unique_ptr<ExecutorThread> executor_thread_;
};

Node::Node(const ServerSettings& settings, std::unique_ptr<Backend> backend,
           SignalWatcher& signals, Log& log)
    : settings_(settings),
      signals_(signals),
      log_(log),
      backend_(std::move(backend)),
      ledger_(MemoryBudget(settings)),
      device_ledger_(MakeDeviceLedger(settings.cuda, *backend_)),
      engine_(
          {settings.service.limits.queue_requests_max, settings.scheduling.yield_share},
          {*backend_, ledger_, clock_, timers_, metrics_,
           device_ledger_ ? &*device_ledger_ : nullptr}),
      leases_({settings.service.limits.lease_ttl_seconds_default,
               settings.service.limits.lease_ttl_seconds_max, settings.leases_max},
              RandomU64(), clock_, timers_, metrics_.kv) {
  const BackendInfo& info = backend_->info();
  metrics_.SetBuildInfo({PBS_VERSION, PBS_COMMIT});
  metrics_.SetBackendInfo({info.name, info.isa, info.device});
}

absl::StatusOr<std::unique_ptr<Node>> Node::Create(const ServerSettings& settings,
                                                   SignalWatcher& signals, Log& log) {
  PBS_ABSL_ASSIGN_OR_RETURN(std::unique_ptr<Backend> backend,
                            MakeBackend(settings, log));
  auto node =
      std::unique_ptr<Node>(new Node(settings, std::move(backend), signals, log));
  PBS_ABSL_RETURN_IF_ERROR(node->Listen());
  return node;
}

ServiceOptions Node::MakeServiceOptions() const {
  const BackendInfo& info = backend_->info();
  ServiceOptions options = settings_.service;
  options.version = PBS_VERSION;
  options.commit = PBS_COMMIT;
  options.backend.name = info.name;
  options.backend.isa = info.isa;
  options.backend.device =
      absl::StrCat(info.device, ", ", info.num_threads, " threads");
  options.backend.head_dims = info.head_dims;
  options.backend.dtypes = info.dtypes;
  return options;
}

absl::Status Node::Listen() {
  PBS_ABSL_ASSIGN_OR_RETURN(
      server_,
      GrpcServer::Create(MakeServiceOptions(),
                         {engine_, leases_, ledger_, metrics_, log_, clock_, timers_}));
  timer_thread_ = std::make_unique<TimerThread>(timers_);
  for (const std::string& address :
       {settings_.service.listen, settings_.metrics_listen}) {
    if (address.empty() || ParseHostPort(address)->IsLoopback()) continue;
    log_.Warning("listening_beyond_loopback",
                 {{"address", address}, {"note", "no encryption, no authentication"}});
  }
  if (settings_.metrics_listen.empty()) return absl::OkStatus();
  std::vector<std::shared_ptr<prometheus::Collectable>> sources = {
      registry_, std::make_shared<SampledGauge>(
                     "pbs_memory_charged_bytes", "Bytes that admission has charged",
                     [this] { return static_cast<double>(ledger_.bytes_held()); })};
  if (device_ledger_) {
    sources.push_back(std::make_shared<SampledGauge>(
        "pbs_device_memory_charged_bytes", "Device bytes that admission has charged",
        [this] { return static_cast<double>(device_ledger_->bytes_held()); }));
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
  log_.Info("model_loading", {{"model", source.name}, {"path", source.path}});
  const absl::Time begin = clock_.Now();
  absl::Time reported = begin;
  ModelOptions options;
  options.kv_dtype = source.kv_dtype;
  options.control.stop = &signals_.stop_flag();
  options.control.progress = [&](int64_t done, int64_t total) {
    constexpr absl::Duration kReportInterval = absl::Seconds(2);
    if (clock_.Now() - reported < kReportInterval) return;
    reported = clock_.Now();
    log_.Info("model_progress",
              {{"model", source.name}, {"bytes", done}, {"bytes_total", total}});
  };
  auto loaded = Model::Load(source.path, options, *backend_);
  if (!loaded.ok()) {
    const absl::Status status = ToAbsl(loaded.status());
    return {status.code(), absl::StrCat("model ", source.name, ": ", status.message())};
  }
  auto served = std::make_unique<ServedModel>();
  served->name = source.name;
  served->model = *std::move(loaded);
  const Model& model = *served->model;
  served->tokens_max =
      std::min(model.config().max_tokens, settings_.service.limits.tokens_max);
  if (source.tokens_max > 0) {
    served->tokens_max = std::min(served->tokens_max, source.tokens_max);
  }
  log_.Info("model_loaded",
            {{"model", source.name},
             {"architecture", ArchitectureName(model.config().architecture)},
             {"layers", model.config().num_layers},
             {"weight_bytes", model.weight_bytes()},
             {"compute_dtype", DTypeName(model.compute_dtype())},
             {"kv_dtype", DTypeName(model.kv_dtype())},
             {"tokens_max", served->tokens_max},
             {"model_digest", model.digest()},
             {"seconds", absl::ToDoubleSeconds(clock_.Now() - begin)}});
  if (device_ledger_ && settings_.cuda.memory_bytes_max == 0) {
    auto charged = device_ledger_->Reserve(model.weight_bytes());
    if (!charged.ok()) {
      return {charged.status().code(),
              absl::StrCat("model ", source.name,
                           ": weights on the device: ", charged.status().message())};
    }
    weights_.push_back(*std::move(charged));
  }
  // What this backend cannot run for anybody must not be served.
  const auto plan = PlanPrefill(
      model,
      {.num_tokens = 1, .attention = settings_.service.default_attention.options});
  if (!plan.ok()) {
    const absl::Status status = ToAbsl(plan.status());
    return {status.code(),
            absl::StrCat("model ", source.name, " cannot run on the ",
                         backend_->info().name, " backend: ", status.message())};
  }
  models_.push_back(std::move(served));
  return absl::OkStatus();
}

absl::Status Node::Prepare() {
  PBS_ABSL_ASSIGN_OR_RETURN(const SelfTestReport report,
                            RunSelfTest(*backend_, *backend_));
  log_.Info("self_test_passed",
            {{"cases", report.num_cases}, {"worst_f32_error", report.worst_f32_error}});
  std::vector<const ServedModel*> models;
  for (const ModelSettings& source : settings_.models) {
    PBS_ABSL_RETURN_IF_ERROR(LoadModel(source));
    models.push_back(models_.back().get());
  }
  executor_thread_ = std::make_unique<ExecutorThread>(engine_.executor(),
                                                      [this] { StopIfDeviceIsLost(); });
  server_->SetModels(std::move(models));
  return absl::OkStatus();
}

void Node::LogServing() const {
  const BackendInfo& info = backend_->info();
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
  log_.Info("serving",
            {{"listen", address},
             {"metrics", metrics},
             {"models", models},
             {"backend", info.name},
             {"isa", info.isa},
             {"device", info.device},
             {"threads", info.num_threads},
             {"bf16_speedup", info.bf16_speedup},
             {"memory_bytes_max", ledger_.bytes_max()},
             {"device_bytes_max", device_ledger_ ? device_ledger_->bytes_max() : 0},
             {"epoch", leases_.epoch()},
             {"version", PBS_VERSION},
             {"commit", PBS_COMMIT}});
  std::printf("pbs-prefilld %s serving on %s, metrics %s, models %s, %s %s x%d\n",
              PBS_VERSION, address.c_str(), metrics.c_str(),
              models.empty() ? "none (raw attention only)" : models.c_str(),
              info.name.c_str(), info.isa.c_str(), info.num_threads);
  std::fflush(stdout);
}

// A device may be lost while nothing runs.
void Node::WatchDevice() {
  constexpr absl::Duration kInterval = absl::Seconds(5);
  StopIfDeviceIsLost();
  if (!device_lost()) timers_.At(clock_.Now() + kInterval, [this] { WatchDevice(); });
}

void Node::StopIfDeviceIsLost() {
  const pbs::Status health = backend_->Health();
  if (health.ok() || device_lost_.exchange(true)) return;
  log_.Error("device_lost", {{"message", health.message()}});
  server_->SetServing(false);
  signals_.RequestStop();
}

void Node::Serve() {
  server_->SetServing(true);
  if (device_ledger_) WatchDevice();
  LogServing();
  signals_.WaitForStop();
}

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
  const int32_t jobs = engine_.executor().Shutdown();
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

int Run(const ServerSettings& settings, SignalWatcher& signals) {
  Log log(settings.log_level);
  auto node = Node::Create(settings, signals, log);
  absl::Status status = node.status();
  if (status.ok()) status = (*node)->Prepare();
  if (absl::IsCancelled(status) && signals.stop_requested()) {
    log.Info("stopped_while_loading");
    return 0;
  }
  if (!status.ok()) {
    log.Error("start_failed", {{"code", absl::StatusCodeToString(status.code())},
                               {"message", std::string(status.message())}});
    return kExitCut;
  }
  (*node)->Serve();
  const bool finished = (*node)->Drain();
  return finished && !(*node)->device_lost() ? 0 : kExitCut;
}

}  // namespace

int Main(int argc, char** argv) {
  CLI::App app("Prefill node for long prompts with permuted block-sparse attention");
  Flags flags;
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;  // 0: --help, --version
  }
  const absl::StatusOr<ServerSettings> settings = ReadSettings(flags);
  if (!settings.ok()) {
    std::fprintf(stderr, "pbs-prefilld: %s\n",
                 std::string(settings.status().message()).c_str());
    return kExitUsage;
  }
  if (flags.check_config) {
    std::printf("the configuration is valid\n");
    return 0;
  }
  TuneMalloc();
  SignalWatcher signals;  // before any other thread: they inherit what it blocks
  return Run(*settings, signals);
}

}  // namespace pbs::server

int main(int argc, char** argv) { return pbs::server::Main(argc, argv); }
