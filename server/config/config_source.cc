#include "server/config/config_source.h"

#include <google/protobuf/util/json_util.h>

#include <cstddef>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/base/status.h"
#include "server/config/field_path.h"
#include "server/config/text_file.h"

namespace pbs::server {
namespace {

absl::Status BadFile(const std::string& path, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("config ", path, ": ", why));
}

}  // namespace

absl::Status ParseConfigJson(absl::string_view json, v1::ServerConfig& config) {
  config.Clear();
  const auto status = google::protobuf::util::JsonStringToMessage(
      google::protobuf::StringPiece(json.data(), json.size()), &config);
  if (status.ok()) return absl::OkStatus();
  const auto message = status.message();
  return absl::InvalidArgumentError(absl::string_view(message.data(), message.size()));
}

absl::Status LoadConfigFile(const std::string& path, v1::ServerConfig& config) {
  PBS_ABSL_ASSIGN_OR_RETURN(const std::string text,
                            ReadTextFile("config", path, kConfigBytesMax));
  const absl::Status status = ParseConfigJson(text, config);
  return status.ok() ? status : BadFile(path, status.message());
}

absl::Status ApplySet(absl::string_view assignment, v1::ServerConfig& config) {
  const size_t equals = assignment.find('=');
  if (equals == absl::string_view::npos || equals == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--set ", assignment, " is not path=value"));
  }
  v1::ServerConfig changed = config;
  const absl::Status status =
      SetField(assignment.substr(0, equals), assignment.substr(equals + 1), changed);
  if (!status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--set ", assignment.substr(0, equals), ": ", status.message()));
  }
  config.Swap(&changed);
  return absl::OkStatus();
}

}  // namespace pbs::server
