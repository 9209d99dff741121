#include "server/config/config_source.h"

#include <fcntl.h>
#include <google/protobuf/util/json_util.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/config/field_path.h"

namespace pbs::server {
namespace {

absl::Status BadFile(const std::string& path, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("config ", path, ": ", why));
}

// Reads at most one byte more than allowed.
absl::Status ReadAll(int file, std::string& text) {
  text.resize(kConfigBytesMax + 1);
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t got = read(file, text.data() + size, text.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return absl::InvalidArgumentError(std::strerror(errno));
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  text.resize(size);
  if (static_cast<int64_t>(size) > kConfigBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file has more than ", kConfigBytesMax, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status ReadRegularFile(const std::string& path, std::string& text) {
  // O_NONBLOCK: opening a pipe must not wait for its writer.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) {
    return absl::NotFoundError(
        absl::StrCat("config ", path, ": ", std::strerror(errno)));
  }
  struct stat info = {};
  absl::Status status = fstat(file, &info) == 0 && S_ISREG(info.st_mode)
                            ? ReadAll(file, text)
                            : absl::InvalidArgumentError("not a regular file");
  close(file);
  return status.ok() ? status : BadFile(path, status.message());
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
  std::string text;
  if (absl::Status status = ReadRegularFile(path, text); !status.ok()) return status;
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
