#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "pbs/limits.h"
#include "server/base/host_port.h"
#include "server/base/unix_listener.h"
#include "server/codec/attention_options.h"
#include "server/config/device_list.h"
#include "server/config/names.h"
#include "server/config/server_settings.h"

namespace pbs::server {
namespace {

constexpr int32_t kModelsMax = 64;
constexpr int32_t kProfilesMax = 64;  // files of a model
constexpr int32_t kPushTargetsMax = 256;
constexpr int32_t kThreadsMax = 1024;
constexpr int32_t kBatchTokensMax = 1 << 16;
constexpr int64_t kMemoryBytesMax = int64_t{1} << 50;

// Collects violations.
class Checker {
 public:
  void Add(std::string violation) { violations_.push_back(std::move(violation)); }

  void Range(const std::string& field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    Add(absl::StrCat(field, " ", value, " is outside [", low, ", ", high, "]"));
  }
  void Range(const std::string& field, int64_t value, SettingRange range) {
    Range(field, value, range.low, range.high);
  }

  template <size_t kSize>
  void OneOf(const std::string& field, const std::string& value,
             const std::array<const char*, kSize>& allowed) {
    if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return;
    Add(absl::StrCat(field, " \"", value, "\" is not one of ",
                     absl::StrJoin(allowed, ", ")));
  }

  std::vector<std::string> Take() { return std::move(violations_); }

 private:
  std::vector<std::string> violations_;
};

constexpr std::array kBackends = {"auto", "cpu", "cuda"};
constexpr std::array kIsas = {"auto", "scalar", "avx2", "avx512", "avx512_bf16"};
constexpr std::array kComputeDTypes = {"auto", "f32", "bf16"};
constexpr std::array kKvDTypes = {"auto", "f32", "f16", "bf16"};
constexpr std::array kAttnFactors = {"applied", "ignored"};
constexpr std::array kLogLevels = {"debug", "info", "warning", "error"};

void CheckAddresses(const v1::ServerConfig& config, Checker& check) {
  const auto listen = ParseHostPort(config.listen());
  if (!listen.ok()) check.Add(absl::StrCat("listen ", listen.status().message()));
  if (!config.advertise().empty()) {
    const auto advertise = ParseHostPort(config.advertise());
    if (!advertise.ok()) {
      check.Add(absl::StrCat("advertise ", advertise.status().message()));
    } else if (advertise->IsEveryAddress()) {
      check.Add(absl::StrCat("advertise \"", config.advertise(),
                             "\" stands for every address; it must name one at which "
                             "decode tiers reach this server"));
    }
  }
  if (config.metrics_listen().empty()) return;
  const auto metrics = ParseHostPort(config.metrics_listen());
  if (!metrics.ok()) {
    check.Add(absl::StrCat("metrics_listen ", metrics.status().message()));
    return;
  }
  if (listen.ok() && metrics->port != 0 && metrics->port == listen->port &&
      metrics->host == listen->host) {
    check.Add(absl::StrCat("metrics_listen \"", config.metrics_listen(),
                           "\" is also listen; they need different ports"));
  }
}

void CheckPushTargets(const v1::ServerConfig& config, Checker& check) {
  check.Range("number of push_targets", config.push_targets_size(), 0, kPushTargetsMax);
  std::set<std::string> seen;
  for (int i = 0; i < config.push_targets_size(); ++i) {
    const std::string& target = config.push_targets(i);
    const std::string field = absl::StrCat("push_targets.", i, " ");
    const auto parsed = ParseHostPort(target);
    if (!parsed.ok()) {
      check.Add(absl::StrCat(field, parsed.status().message()));
    } else if (parsed->port == 0 || parsed->IsEveryAddress()) {
      check.Add(absl::StrCat(field, "\"", target,
                             "\" is no address to connect to; it "
                             "names one host and a port in [1, 65535]"));
    } else if (!seen.insert(target).second) {
      check.Add(absl::StrCat(field, "\"", target, "\" is there twice"));
    }
  }
}

void CheckSharedMemory(const v1::ServerConfig& config, Checker& check) {
  const std::string& path = config.shared_memory_socket();
  if (path.empty()) return;
  check.Range("bytes of shared_memory_socket", static_cast<int64_t>(path.size()), 1,
              kUnixPathBytesMax);
  if (path.find('\0') != std::string::npos) {
    check.Add("shared_memory_socket has a zero byte; it names a file");
  }
  if (config.backend() == "cuda") {
    check.Add(
        absl::StrCat("shared_memory_socket \"", path, "\" ", kSharedMemoryNeedsCpu));
  }
}

void CheckModels(const v1::ServerConfig& config, Checker& check) {
  if (config.models_size() > kModelsMax) {
    check.Range("number of models", config.models_size(), 0, kModelsMax);
  }
  std::set<std::string> names;
  for (int i = 0; i < config.models_size(); ++i) {
    const v1::ModelSource& model = config.models(i);
    const std::string field = absl::StrCat("models.", i, ".");
    if (!IsName(model.name())) {
      check.Add(absl::StrCat(field, "name \"", model.name(), "\" is not ", kNameRule));
    } else if (!names.insert(model.name()).second) {
      check.Add(absl::StrCat(field, "name \"", model.name(),
                             "\" is taken by an earlier model; names are unique"));
    }
    if (model.path().empty()) {
      check.Add(absl::StrCat(field, "path \"\" is empty; it names a model folder"));
    }
    check.OneOf(field + "kv_dtype", model.kv_dtype(), kKvDTypes);
    check.OneOf(field + "yarn_attn_factor", model.yarn_attn_factor(), kAttnFactors);
    check.Range(field + "tokens_max", model.tokens_max(), 0, kSeqLenMax);
    check.Range(field + "number of profiles", model.profiles_size(), 0, kProfilesMax);
    for (int file = 0; file < model.profiles_size(); ++file) {
      if (!model.profiles(file).empty()) continue;
      check.Add(absl::StrCat(field, "profiles.", file,
                             " \"\" is empty; it names the file of a profile"));
    }
  }
}

void CheckAdmission(const v1::AdmissionConfig& config, Checker& check) {
  check.Range("admission.memory_bytes_max", config.memory_bytes_max(), 0,
              kMemoryBytesMax);
  check.Range("admission.queue_requests_max", config.queue_requests_max(), 1, 65'536);
  check.Range("admission.tokens_max", config.tokens_max(), kTokensRange);
  check.Range("admission.attend_tokens_max", config.attend_tokens_max(), kTokensRange);
  check.Range("admission.upload_seconds_max", config.upload_seconds_max(),
              kUploadSecondsRange);
  check.Range("admission.upload_requests_max", config.upload_requests_max(),
              kUploadRequestsRange);
}

void CheckLease(const v1::LeaseConfig& config, Checker& check) {
  check.Range("lease.ttl_seconds_max", config.ttl_seconds_max(), 1, kDaySeconds);
  check.Range("lease.ttl_seconds_default", config.ttl_seconds_default(), 1,
              std::clamp(config.ttl_seconds_max(), 1, kDaySeconds));
  check.Range("lease.leases_max", config.leases_max(), 1, 1'000'000);
}

void CheckTransport(const v1::TransportConfig& config, Checker& check) {
  check.Range("transport.chunk_bytes", config.chunk_bytes(), kChunkBytesRange);
  check.Range("transport.connections_max", config.connections_max(), kConnectionsRange);
  check.Range("transport.metadata_bytes_max", config.metadata_bytes_max(),
              kMetadataBytesRange);
  check.Range("transport.concurrent_streams_max", config.concurrent_streams_max(),
              kConcurrentStreamsRange);
  check.Range("transport.memory_quota_bytes", config.memory_quota_bytes(),
              kMemoryQuotaBytesRange);
  check.Range("transport.stream_window_bytes", config.stream_window_bytes(),
              kStreamWindowBytesRange);
  check.Range("transport.keepalive_seconds", config.keepalive_seconds(),
              kKeepaliveSecondsRange);
  check.Range("transport.keepalive_timeout_seconds", config.keepalive_timeout_seconds(),
              kKeepaliveSecondsRange);
  check.Range("transport.write_stall_seconds_max", config.write_stall_seconds_max(),
              kWriteStallSecondsRange);
}

void CheckScheduling(const v1::SchedulingConfig& config, Checker& check) {
  const double share = config.yield_share();
  if (!(share >= 0 && share <= 1)) {
    check.Add(absl::StrCat("scheduling.yield_share ", share, " is outside [0, 1]"));
  }
  check.Range("scheduling.batch_tokens_max", config.batch_tokens_max(), 0,
              kBatchTokensMax);
  check.Range("scheduling.batch_prompt_tokens_max", config.batch_prompt_tokens_max(), 1,
              kBatchTokensMax);
}

void CheckDefaultAttention(const v1::AttentionOptions& wire, Checker& check) {
  const auto profile = DecodeAttentionProfile(wire);
  if (!profile.ok()) {
    check.Add(absl::StrCat("default_attention: ", profile.status().message()));
    return;
  }
  if (profile->options.use_given_order || profile->options.use_given_lists) {
    check.Add(
        "default_attention: use_given_order and use_given_lists need tensors "
        "that only a request has; a profile has them false");
  }
  // The smallest problem there is: what remains to refuse is the options'.
  const AttentionProblem problem = {
      {1, 1, kHeadDims[0], {{1, 1}}}, DType::kF32, profile->options};
  if (const pbs::Status status = ValidateProblem(problem); !status.ok()) {
    check.Add(absl::StrCat("default_attention: ", status.message()));
  }
}

}  // namespace

std::vector<std::string> Validate(const v1::ServerConfig& config) {
  Checker check;
  CheckAddresses(config, check);
  CheckPushTargets(config, check);
  CheckSharedMemory(config, check);
  check.OneOf("backend", config.backend(), kBackends);
  CheckModels(config, check);
  check.Range("cpu.threads", config.cpu().threads(), 0, kThreadsMax);
  check.OneOf("cpu.isa", config.cpu().isa(), kIsas);
  check.OneOf("cpu.compute_dtype", config.cpu().compute_dtype(), kComputeDTypes);
  check.Range("cuda.device", config.cuda().device(), 0, kDevicesMax - 1);
  check.Range("cuda.memory_bytes_max", config.cuda().memory_bytes_max(), 0,
              kMemoryBytesMax);
  if (const auto devices = ParseDevices(config.cuda().devices()); !devices.ok()) {
    check.Add(absl::StrCat("cuda.devices ", devices.status().message()));
  }
  CheckScheduling(config.scheduling(), check);
  CheckAdmission(config.admission(), check);
  CheckLease(config.lease(), check);
  CheckTransport(config.transport(), check);
  check.OneOf("log.level", config.log().level(), kLogLevels);
  check.Range("drain_seconds_max", config.drain_seconds_max(), 0, kDaySeconds);
  CheckDefaultAttention(config.default_attention(), check);
  return check.Take();
}

}  // namespace pbs::server
