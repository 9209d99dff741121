// Read-only files, read by position into the caller's memory.
//
// Files are never mapped: a mapped file that shrinks raises SIGBUS, but a short read is
// a Status. Symbolic links are followed (hub caches are made of them). A target that is
// not a regular file - a FIFO, a device, a folder - is refused before it is read. So
// are the traces of an unfinished download: a link whose target is missing, and a Git
// LFS pointer.
//
// Threading: a File may be read from many threads at once.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "pbs/status.h"

namespace pbs {

class File {
 public:
  // NotFound when the file is missing. InvalidArgument, with advice, when it is no
  // regular file, a link without a target or a Git LFS pointer. FailedPrecondition,
  // with the system's reason, for other errors.
  static StatusOr<File> Open(const std::string& path);

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  int64_t size() const { return size_; }  // when it was opened
  const std::string& path() const { return path_; }

  // Reads exactly `bytes` bytes at `offset`. DataLoss when the file ends earlier.
  Status ReadAt(int64_t offset, int64_t bytes, void* target) const;

 private:
  File(int descriptor, int64_t size, std::string path)
      : descriptor_(descriptor), size_(size), path_(std::move(path)) {}

  int descriptor_ = -1;
  int64_t size_ = 0;
  std::string path_;
};

// Reads a small file as text. InvalidArgument when it is larger than `bytes_max`.
StatusOr<std::string> ReadTextFile(const std::string& path, int64_t bytes_max);

}  // namespace pbs
