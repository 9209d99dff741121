// Options of the service, as plain structs. ServerConfig's messages of the same names
// are converted to them. Their initial values are the defaults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pbs/limits.h"
#include "server/codec/attention_options.h"
#include "server/codec/backend_facts.h"
#include "server/codec/kv_format.h"

namespace pbs::server {

// Valid range of a setting. The configuration and GrpcServer::Create() refuse other
// values.
struct SettingRange {
  int64_t low;
  int64_t high;
};
inline constexpr int32_t kDaySeconds = 86'400;
inline constexpr SettingRange kTokensRange = {1, kSeqLenMax};
inline constexpr SettingRange kUploadSecondsRange = {1, kDaySeconds};
inline constexpr SettingRange kUploadRequestsRange = {1, 65'536};
inline constexpr SettingRange kChunkBytesRange = {kChunkBytesMin, kChunkBytesMax};
inline constexpr SettingRange kConcurrentStreamsRange = {1, 1024};
inline constexpr SettingRange kConnectionsRange = {1, 1'000'000};
inline constexpr SettingRange kMetadataBytesRange = {8 << 10, 1 << 20};
inline constexpr SettingRange kMemoryQuotaBytesRange = {16 << 20, int64_t{1} << 40};
inline constexpr SettingRange kStreamWindowBytesRange = {64 << 10, 16 << 20};
inline constexpr SettingRange kKeepaliveSecondsRange = {1, 3600};
inline constexpr SettingRange kWriteStallSecondsRange = {1, 3600};

struct TransportOptions {
  int32_t chunk_bytes = 1 << 20;             // when a request asks for no other size
  int32_t connections_max = 1024;            // open at once
  int32_t concurrent_streams_max = 64;       // per connection
  int32_t metadata_bytes_max = 64 << 10;     // of a call: names, values, 32 per entry
  int64_t memory_quota_bytes = 256ll << 20;  // gRPC's buffers, all connections
  int32_t stream_window_bytes = 1 << 20;     // HTTP/2 lookahead of a stream
  int32_t keepalive_seconds = 30;            // ping a silent client after
  int32_t keepalive_timeout_seconds = 20;    // and drop it after
  // A call is cut when its reader takes nothing for this time (at the latest after
  // twice this time).
  int32_t write_stall_seconds_max = 60;
};

// gRPC accepts this many times metadata_bytes_max.
inline constexpr int32_t kMetadataConnectionFactor = 4;

struct ServiceLimits {
  int32_t tokens_max = 1 << 20;         // longest prompt
  int32_t attend_tokens_max = 1 << 20;  // keys of one raw sequence
  int32_t queue_requests_max = 64;      // waiting, in the engine of each device
  int32_t upload_seconds_max = 120;     // header to last chunk
  int32_t upload_requests_max = 32;     // uploads under way at once
};

struct ServiceOptions {
  std::string listen = "127.0.0.1:50051";  // host:port; port 0 picks one
  bool reflection = false;
  std::vector<std::string> push_targets;  // host:port; where caches may be pushed
  TransportOptions transport;
  ServiceLimits limits;
  AttentionProfile default_attention = DefaultProfile();  // of Prefill
  std::string version;                                    // of the build
  std::string commit;
  BackendFacts backend;
};

}  // namespace pbs::server
