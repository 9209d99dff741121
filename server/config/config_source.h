// Sources of the configuration: one JSON file, then `--set path=value`.
//
// The JSON is protobuf's own mapping of pbs.v1.ServerConfig; unknown fields are
// refused.
//
// Threading: stateless. Memory: a file is read whole, at most kConfigBytesMax.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "pbs/v1/server_config.pb.h"

namespace pbs::server {

inline constexpr int64_t kConfigBytesMax = 1 << 20;

// Replaces `config` by the configuration in `json`. InvalidArgument names the field and
// the position; `config` is then unspecified.
absl::Status ParseConfigJson(absl::string_view json, v1::ServerConfig& config);

// The same from a regular file. NotFound, or InvalidArgument that starts with the path.
absl::Status LoadConfigFile(const std::string& path, v1::ServerConfig& config);

// Applies "path=value". The path is dotted. An element of a list is named by its index;
// the index after the last one appends:
//
//   admission.queue_requests_max=128     models.0.name=tiny
//   default_attention.pbs.threshold=0.8  transport={"chunk_bytes":65536}
//   push_targets.0=decode-0:50070
//
// The value is text for string fields, an enum's name, true or false, a number; a
// message takes JSON, which replaces it. InvalidArgument names the wrong part and what
// is accepted; `config` is then unchanged.
absl::Status ApplySet(absl::string_view assignment, v1::ServerConfig& config);

}  // namespace pbs::server
