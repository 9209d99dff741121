// pbs-prefilld: reads the configuration, makes a node of it, serves until SIGTERM or
// SIGINT, drains, exits.
//
// Exit status: 0 after a drain that finished all admitted work, 1 when the server could
// not start, the drain's limit cut work, the device was lost or the system refused
// memory or a thread, 2 for a wrong command line or configuration.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/log.h"
#include "server/base/process.h"
#include "server/base/signal_watcher.h"
#include "server/base/status.h"
#include "server/base/terminate_handler.h"
#include "server/base/thread_check.h"
#include "server/config/config_source.h"
#include "server/config/server_settings.h"
#include "server/node/node.h"
#include "server/service/library_log.h"

namespace pbs::server {
namespace {

constexpr int kExitCut = 1;
constexpr int kExitUsage = 2;
// Threads of the server, of gRPC and of the metrics: about twenty while serving.
constexpr int32_t kThreadsBesideWorkers = 24;

// ---- the command line

struct Flags {
  std::string config;
  std::vector<std::string> sets;
  std::vector<std::string> models;    // NAME=PATH
  std::vector<std::string> profiles;  // MODEL=FILE
  std::string listen;
  std::string metrics_listen;
  std::string backend;
  std::string devices;
  std::string log_level;
  std::string metrics_compat;
  std::optional<int32_t> threads;
  bool check_config = false;
};

void AddFlags(CLI::App& app, Flags& flags) {
  app.set_version_flag("--version", "pbs-prefilld " PBS_VERSION " (" PBS_COMMIT ")");
  app.add_option("--config", flags.config, "JSON file with a ServerConfig");
  app.add_option("--set", flags.sets,
                 "PATH=VALUE: sets a field after the file; repeatable")
      ->allow_extra_args(false);
  app.add_option("--model", flags.models, "NAME=PATH of a model folder; repeatable")
      ->allow_extra_args(false);
  app.add_option("--profile", flags.profiles,
                 "MODEL=FILE of a profile of a model; repeatable")
      ->allow_extra_args(false);
  app.option_defaults()->take_last();  // of the flags below
  app.add_option("--listen", flags.listen, "host:port [127.0.0.1:50051]");
  app.add_option("--metrics-listen", flags.metrics_listen,
                 "host:port [127.0.0.1:9464]; \"off\" for none");
  app.add_option("--backend", flags.backend, "auto, cpu or cuda [auto]");
  app.add_option("--devices", flags.devices,
                 "GPUs to use: all, or a list of numbers such as 0,2 [0]");
  app.add_option("--threads", flags.threads,
                 "CPU threads; 0 = all this process may use");
  app.add_option("--log-level", flags.log_level,
                 "debug, info, warning or error [info]");
  app.add_option("--metrics-compat", flags.metrics_compat,
                 "vllm: also export vLLM's metric names")
      ->check(CLI::IsMember({"vllm"}));
  app.add_flag("--check-config", flags.check_config,
               "check the configuration and exit");
}

absl::Status AddModel(const std::string& flag, v1::ServerConfig& config) {
  const size_t equals = flag.find('=');
  if (equals == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model ", flag,
                     " is not NAME=PATH; give both, as in --model tiny=/models/t"));
  }
  v1::ModelSource& model = *config.add_models();
  model.set_name(flag.substr(0, equals));
  model.set_path(flag.substr(equals + 1));
  return absl::OkStatus();
}

absl::Status AddProfile(const std::string& flag, v1::ServerConfig& config) {
  const size_t equals = flag.find('=');
  if (equals == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("--profile ", flag,
                     " is not MODEL=FILE; give both, as in --profile tiny=mine.json"));
  }
  const std::string name = flag.substr(0, equals);
  for (v1::ModelSource& model : *config.mutable_models()) {
    if (model.name() != name) continue;
    model.add_profiles(flag.substr(equals + 1));
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--profile ", flag, ": no model is named \"", name, "\""));
}

// --model comes before --set, so that --set can change fields of its models, but not
// their names and paths.
absl::Status CheckModelsKept(const v1::ServerConfig& before,
                             const v1::ServerConfig& after) {
  for (int i = 0; i < before.models_size(); ++i) {
    const v1::ModelSource& model = before.models(i);
    if (i < after.models_size() && after.models(i).name() == model.name() &&
        after.models(i).path() == model.path()) {
      continue;
    }
    return absl::InvalidArgumentError(
        absl::StrCat("--set changes name or path of models.", i, ", which --model ",
                     model.name(), "=", model.path(), " gave; use another index, from ",
                     before.models_size(), " on"));
  }
  return absl::OkStatus();
}

// Applies the file, --model, --set and then the other flags. The error lists every
// violation; a file that cannot be read is reported alone.
absl::StatusOr<ServerSettings> ReadSettings(const Flags& flags) {
  v1::ServerConfig config;
  if (!flags.config.empty()) {
    PBS_ABSL_RETURN_IF_ERROR(LoadConfigFile(flags.config, config));
  }
  std::vector<std::string> violations;
  const auto note = [&violations](const absl::Status& status) {
    if (!status.ok()) violations.emplace_back(status.message());
  };
  for (const std::string& model : flags.models) note(AddModel(model, config));
  const v1::ServerConfig before = config;
  for (const std::string& set : flags.sets) note(ApplySet(set, config));
  if (!flags.models.empty()) note(CheckModelsKept(before, config));
  for (const std::string& profile : flags.profiles) note(AddProfile(profile, config));
  if (!flags.listen.empty()) config.set_listen(flags.listen);
  if (!flags.metrics_listen.empty()) {
    config.set_metrics_listen(flags.metrics_listen == "off" ? ""
                                                            : flags.metrics_listen);
  }
  if (!flags.backend.empty()) config.set_backend(flags.backend);
  if (!flags.devices.empty()) config.mutable_cuda()->set_devices(flags.devices);
  if (!flags.log_level.empty()) config.mutable_log()->set_level(flags.log_level);
  if (!flags.metrics_compat.empty()) config.set_vllm_metrics(true);
  if (flags.threads.has_value()) config.mutable_cpu()->set_threads(*flags.threads);
  absl::StatusOr<ServerSettings> settings = MakeSettings(std::move(config));
  if (violations.empty()) return settings;
  note(settings.status());
  return absl::InvalidArgumentError(absl::StrJoin(violations, "\n"));
}

absl::Status Start(const ServerSettings& settings, SignalWatcher& signals, Log& log,
                   std::unique_ptr<Node>& node) {
  const int32_t workers =
      settings.cpu.threads > 0 ? settings.cpu.threads : UsableCpus();
  PBS_ABSL_RETURN_IF_ERROR(TryThreads(kThreadsBesideWorkers + workers));
  PBS_ABSL_ASSIGN_OR_RETURN(
      node, Node::Create(settings, {PBS_VERSION, PBS_COMMIT}, signals, log));
  return node->Prepare();
}

int Run(const ServerSettings& settings, SignalWatcher& signals) {
  Log log(settings.log_level);
  const LibraryLog library_log(log);
  std::unique_ptr<Node> node;
  const absl::Status status = Start(settings, signals, log, node);
  if (absl::IsCancelled(status) && signals.stop_requested()) {
    log.Info("stopped_while_loading");
    return 0;
  }
  if (!status.ok()) {
    log.Error("start_failed", {{"code", absl::StatusCodeToString(status.code())},
                               {"message", std::string(status.message())}});
    return kExitCut;
  }
  node->Serve();
  const bool finished = node->Drain();
  return finished && !node->device_lost() ? 0 : kExitCut;
}

}  // namespace

int Main(int argc, char** argv) {
  InstallTerminateHandler();
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
