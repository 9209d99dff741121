// ServerSettings: the configuration as plain values, every default applied and every
// limit checked. Each module takes its own part, so that only main() sees the protobuf
// message. The initial values of these structs, and of the modules' structs in them,
// are the defaults of the configuration. ApplyDefaults() spells those that are names
// in the configuration.
//
// Threading: a value, immutable after start.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pbs/dtype.h"
#include "pbs/v1/server_config.pb.h"
#include "server/base/log.h"
#include "server/model/rope_config.h"
#include "server/service/options.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

// Why shared_memory_socket is refused on other backends.
inline constexpr char kSharedMemoryNeedsCpu[] =
    "needs backend cpu: on a GPU's server caches are in pinned memory, which cannot be "
    "shared";

enum class BackendChoice : uint8_t { kAuto, kCpu, kCuda };

struct ModelSettings {
  std::string name;
  std::string path;
  std::optional<DType> kv_dtype;  // unset: the dtype that the model computes in
  int32_t tokens_max = 0;         // 0: the model's own limit
  AttnFactor yarn_attn_factor = AttnFactor::kApplied;
  std::vector<std::string> profiles = {};  // files
};

struct CpuSettings {
  int32_t threads = 0;                 // 0: the CPUs this process may use
  std::string isa = "auto";            // or a name
  std::string compute_dtype = "auto";  // or "f32", "bf16"
};

struct CudaSettings {
  std::string module;  // "": CudaModule::Load() looks for it
  std::string cublaslt;
  std::vector<int32_t> devices = {0};  // each once; empty: all that CUDA lists
  int64_t memory_bytes_max = 0;        // of each device; 0: decided at start
};

struct SchedulingSettings {
  double yield_share = 0.25;
  int32_t batch_tokens_max = 0;  // 0: decided by the backend
  int32_t batch_prompt_tokens_max = 1024;
};

struct ServerSettings {
  // main() fills in version, commit and backend facts.
  ServiceOptions service;
  // What service.default_attention may be, the best first: what the configuration says,
  // or, when it names no method, DefaultProfiles() with what it sets.
  std::vector<AttentionProfile> default_attentions;
  std::string metrics_listen = "127.0.0.1:9464";  // "": off
  std::string advertise;                          // see AdvertisedEndpoint()
  std::string shared_memory_socket;               // "": caches are in private memory
  BackendChoice backend = BackendChoice::kAuto;
  bool vllm_metrics = false;
  std::vector<ModelSettings> models;
  CpuSettings cpu;
  CudaSettings cuda;
  SchedulingSettings scheduling;
  int64_t memory_bytes_max = 0;  // 0: decided at start (docs/OPERATIONS.md)
  LeaseOptions leases;
  LogLevel log_level = LogLevel::kInfo;
  absl::Duration drain_max = absl::Seconds(60);
};

// ServerSettings::default_attentions, given what the configuration sets.
std::vector<v1::AttentionOptions> DefaultAttentions(const v1::AttentionOptions& asked);

// Sets every unset field to its documented default.
void ApplyDefaults(v1::ServerConfig& config);

// Returns every violation as "field value limit"; empty when there is none. Pure: it
// reads no file, clock or fact of the machine. Unset fields are violations: apply
// defaults first.
std::vector<std::string> Validate(const v1::ServerConfig& config);

// ApplyDefaults(), Validate() and the conversion. InvalidArgument lists every
// violation, one per line.
absl::StatusOr<ServerSettings> MakeSettings(v1::ServerConfig config);

}  // namespace pbs::server
