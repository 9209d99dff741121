// SharedRegion: memory that other processes of this user may map for reading, and that
// this process can take away from them.
//
// The memory is a memfd. Its size is sealed, so no access to a mapping of it can fault
// with SIGBUS. The destructor frees all pages, also those that others have mapped:
// these then read zeros. A region is never used twice, so nothing of a later owner can
// appear in an old mapping.
//
// The file mode and the read-only descriptors protect from mistakes. They are no
// boundary: a process of the same user can change the mode.
//
// Threading: as memory; OpenReadOnly() from any thread. Memory: pages on first touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "absl/status/statusor.h"
#include "server/base/file_descriptor.h"

namespace pbs::server {

class SharedRegion {
 public:
  // Zeroed memory; requires `bytes` >= 1. ResourceExhausted names the refused size and
  // the reason, such as no free descriptor.
  static absl::StatusOr<std::unique_ptr<SharedRegion>> Create(int64_t bytes);
  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  std::span<std::byte> bytes() const { return bytes_; }
  // A new descriptor, open for reading only. ResourceExhausted when there is none free.
  absl::StatusOr<FileDescriptor> OpenReadOnly() const;

 private:
  SharedRegion(FileDescriptor file, std::span<std::byte> bytes)
      : file_(std::move(file)), bytes_(bytes) {}

  const FileDescriptor file_;
  const std::span<std::byte> bytes_;
};

}  // namespace pbs::server
