#include "server/config/text_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace pbs::server {
namespace {

// Reads at most one byte more than allowed.
absl::Status ReadAll(int file, int64_t bytes_max, std::string& text) {
  text.resize(static_cast<size_t>(bytes_max) + 1);
  size_t size = 0;
  while (size < text.size()) {
    const ssize_t got = read(file, text.data() + size, text.size() - size);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return absl::InvalidArgumentError(std::strerror(errno));
    if (got == 0) break;
    size += static_cast<size_t>(got);
  }
  text.resize(size);
  if (static_cast<int64_t>(size) > bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("the file has more than ", bytes_max, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> ReadTextFile(absl::string_view kind,
                                         const std::string& path, int64_t bytes_max) {
  // O_NONBLOCK: opening a pipe must not wait for its writer.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) {
    return absl::NotFoundError(
        absl::StrCat(kind, " ", path, ": ", std::strerror(errno)));
  }
  std::string text;
  struct stat info = {};
  const absl::Status status = fstat(file, &info) == 0 && S_ISREG(info.st_mode)
                                  ? ReadAll(file, bytes_max, text)
                                  : absl::InvalidArgumentError("not a regular file");
  close(file);
  if (status.ok()) return text;
  return absl::InvalidArgumentError(
      absl::StrCat(kind, " ", path, ": ", status.message()));
}

}  // namespace pbs::server
