#include "server/config/server_settings.h"

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "pbs/check.h"
#include "server/codec/attention_options.h"
#include "server/config/device_list.h"

namespace pbs::server {
namespace {

// The converters require a config without violations.
BackendChoice ToBackend(const std::string& name) {
  if (name == "cpu") return BackendChoice::kCpu;
  if (name == "cuda") return BackendChoice::kCuda;
  return BackendChoice::kAuto;
}

LogLevel ToLogLevel(const std::string& name) {
  for (LogLevel level : {LogLevel::kDebug, LogLevel::kInfo, LogLevel::kWarning}) {
    if (name == LogLevelName(level)) return level;
  }
  return LogLevel::kError;
}

std::optional<DType> ToDType(const std::string& name) {
  const auto dtype = ParseDType(name);
  if (!dtype.ok()) return std::nullopt;  // "auto"
  return *dtype;
}

ModelSettings ToModel(const v1::ModelSource& source) {
  const bool ignored =
      source.yarn_attn_factor() == AttnFactorName(AttnFactor::kIgnored);
  return {.name = source.name(),
          .path = source.path(),
          .kv_dtype = ToDType(source.kv_dtype()),
          .tokens_max = source.tokens_max(),
          .yarn_attn_factor = ignored ? AttnFactor::kIgnored : AttnFactor::kApplied,
          .profiles = {source.profiles().begin(), source.profiles().end()}};
}

ServiceLimits ToLimits(const v1::AdmissionConfig& admission) {
  ServiceLimits limits;
  limits.tokens_max = admission.tokens_max();
  limits.attend_tokens_max = admission.attend_tokens_max();
  limits.queue_requests_max = admission.queue_requests_max();
  limits.upload_seconds_max = admission.upload_seconds_max();
  limits.upload_requests_max = admission.upload_requests_max();
  return limits;
}

TransportOptions ToTransport(const v1::TransportConfig& config) {
  TransportOptions options;
  options.chunk_bytes = config.chunk_bytes();
  options.connections_max = config.connections_max();
  options.metadata_bytes_max = config.metadata_bytes_max();
  options.concurrent_streams_max = config.concurrent_streams_max();
  options.memory_quota_bytes = config.memory_quota_bytes();
  options.stream_window_bytes = config.stream_window_bytes();
  options.keepalive_seconds = config.keepalive_seconds();
  options.keepalive_timeout_seconds = config.keepalive_timeout_seconds();
  options.write_stall_seconds_max = config.write_stall_seconds_max();
  return options;
}

std::vector<int32_t> ToDevices(const v1::CudaConfig& config) {
  if (config.devices().empty()) return {config.device()};
  return *ParseDevices(config.devices());
}

AttentionProfile ToProfile(const v1::AttentionOptions& wire) {
  const auto profile = DecodeAttentionProfile(wire);
  PBS_CHECK(profile.ok());
  return *profile;
}

}  // namespace

absl::StatusOr<ServerSettings> MakeSettings(v1::ServerConfig config) {
  const v1::AttentionOptions asked = config.default_attention();
  ApplyDefaults(config);
  const std::vector<std::string> violations = Validate(config);
  if (!violations.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("the configuration has ",
                                                   violations.size(), " error(s):\n  ",
                                                   absl::StrJoin(violations, "\n  ")));
  }
  ServerSettings settings;
  settings.service.listen = config.listen();
  settings.service.reflection = config.reflection();
  settings.service.push_targets = {config.push_targets().begin(),
                                   config.push_targets().end()};
  settings.service.transport = ToTransport(config.transport());
  settings.service.limits = ToLimits(config.admission());
  for (const v1::AttentionOptions& wire : DefaultAttentions(asked)) {
    settings.default_attentions.push_back(ToProfile(wire));
  }
  settings.service.default_attention = settings.default_attentions.front();
  settings.metrics_listen = config.metrics_listen();
  settings.advertise = config.advertise();
  settings.shared_memory_socket = config.shared_memory_socket();
  settings.backend = ToBackend(config.backend());
  settings.vllm_metrics = config.vllm_metrics();
  for (const v1::ModelSource& model : config.models()) {
    settings.models.push_back(ToModel(model));
  }
  settings.cpu = {.threads = config.cpu().threads(),
                  .isa = config.cpu().isa(),
                  .compute_dtype = config.cpu().compute_dtype()};
  settings.cuda = {.module = config.cuda().module(),
                   .cublaslt = config.cuda().cublaslt(),
                   .devices = ToDevices(config.cuda()),
                   .memory_bytes_max = config.cuda().memory_bytes_max()};
  settings.scheduling = {
      .yield_share = config.scheduling().yield_share(),
      .batch_tokens_max = config.scheduling().batch_tokens_max(),
      .batch_prompt_tokens_max = config.scheduling().batch_prompt_tokens_max()};
  settings.leases = {.ttl_seconds_default = config.lease().ttl_seconds_default(),
                     .ttl_seconds_max = config.lease().ttl_seconds_max(),
                     .leases_max = config.lease().leases_max()};
  settings.memory_bytes_max = config.admission().memory_bytes_max();
  settings.log_level = ToLogLevel(config.log().level());
  settings.drain_max = absl::Seconds(config.drain_seconds_max());
  return settings;
}

}  // namespace pbs::server
