// A Unix socket that listens at a path of the file system, for programs of this user.
//
// Threading: a value with one owner.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/base/file_descriptor.h"

namespace pbs::server {

// Of a path, without the zero at its end.
inline constexpr size_t kUnixPathBytesMax = 107;

class UnixListener {
 public:
  // Listens at `path`, with mode 0600. Replaces the file of a server that has ended.
  // Unavailable "FIELD PATH cannot be bound: " with the reason, such as a server that
  // listens there or a file that is no socket. The socket does not block.
  static absl::StatusOr<std::unique_ptr<UnixListener>> Create(absl::string_view field,
                                                              const std::string& path);
  // Removes the file, unless another one is at the path by now.
  ~UnixListener();
  UnixListener(const UnixListener&) = delete;
  UnixListener& operator=(const UnixListener&) = delete;

  int get() const { return socket_.get(); }
  const std::string& path() const { return path_; }

 private:
  UnixListener(std::string path, FileDescriptor socket, dev_t device, ino_t inode)
      : path_(std::move(path)),
        socket_(std::move(socket)),
        device_(device),
        inode_(inode) {}

  const std::string path_;
  const FileDescriptor socket_;
  const dev_t device_;  // of the file, as inode_
  const ino_t inode_;
};

}  // namespace pbs::server
