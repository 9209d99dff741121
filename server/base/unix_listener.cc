#include "server/base/unix_listener.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

constexpr int kBacklog = 128;

absl::Status ErrorOf(int error) { return absl::UnavailableError(std::strerror(error)); }

FileDescriptor MakeSocket() {
  return FileDescriptor(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

// Removes the socket of a server that has ended.
absl::Status RemoveStale(const std::string& path, const sockaddr_un& address) {
  struct stat info = {};
  if (lstat(path.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : ErrorOf(errno);
  }
  if (!S_ISSOCK(info.st_mode)) {
    return absl::UnavailableError(
        "there is a file that is not a socket; remove it or "
        "choose another path");
  }
  const FileDescriptor probe = MakeSocket();
  if (!probe.is_open()) return ErrorOf(errno);
  const bool connected =
      connect(probe.get(), reinterpret_cast<const sockaddr*>(&address),
              sizeof(address)) == 0;
  if (connected || errno == EAGAIN) {  // EAGAIN: many wait for it
    return absl::UnavailableError(
        "another server listens there; choose another path or stop that server");
  }
  if (errno != ECONNREFUSED) return ErrorOf(errno);
  return unlink(path.c_str()) == 0 || errno == ENOENT ? absl::OkStatus()
                                                      : ErrorOf(errno);
}

absl::StatusOr<FileDescriptor> Bind(const std::string& path, struct stat& info) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() > kUnixPathBytesMax) {
    return absl::UnavailableError(absl::StrCat(
        path.size(), " bytes of path are outside [1, ", kUnixPathBytesMax, "]"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  PBS_ABSL_RETURN_IF_ERROR(RemoveStale(path, address));
  FileDescriptor made = MakeSocket();
  // The mode of an unbound socket is that of its file: the file is never open to
  // others.
  if (!made.is_open() || fchmod(made.get(), S_IRUSR | S_IWUSR) != 0 ||
      bind(made.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) !=
          0) {
    return ErrorOf(errno);
  }
  if (lstat(path.c_str(), &info) != 0 || listen(made.get(), kBacklog) != 0) {
    return ErrorOf(errno);
  }
  return made;
}

}  // namespace

absl::StatusOr<std::unique_ptr<UnixListener>> UnixListener::Create(
    absl::string_view field, const std::string& path) {
  struct stat info = {};
  absl::StatusOr<FileDescriptor> bound = Bind(path, info);
  if (!bound.ok()) {
    return absl::UnavailableError(
        absl::StrCat(field, " ", path, " cannot be bound: ", bound.status().message()));
  }
  return std::unique_ptr<UnixListener>(
      new UnixListener(path, *std::move(bound), info.st_dev, info.st_ino));
}

UnixListener::~UnixListener() {
  struct stat info = {};
  if (lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ &&
      info.st_ino == inode_) {
    unlink(path_.c_str());
  }
}

}  // namespace pbs::server
