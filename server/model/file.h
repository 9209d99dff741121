// Read-only files, read by position into the caller's memory.
//
// Never mapped: a mapped file that shrinks is a SIGBUS, a short read is a Status.
// Symbolic links are followed (hub caches are made of them); anything that is not a
// regular file in the end - a FIFO, a device, a folder - is refused before it is read.
// So is what an unfinished download leaves in a file's place: a link whose target is
// missing, and a Git LFS pointer.
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
  // NotFound when there is none; InvalidArgument for what is no regular file, a link to
  // nothing or a Git LFS pointer, with what to do; FailedPrecondition names the
  // system's reason otherwise.
  static StatusOr<File> Open(const std::string& path);

  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  int64_t size() const { return size_; }  // when it was opened
  const std::string& path() const { return path_; }

  // Reads exactly `bytes` at `offset`. DataLoss when the file ends before.
  Status ReadAt(int64_t offset, int64_t bytes, void* target) const;

 private:
  File(int descriptor, int64_t size, std::string path)
      : descriptor_(descriptor), size_(size), path_(std::move(path)) {}

  int descriptor_ = -1;
  int64_t size_ = 0;
  std::string path_;
};

// A small file as text. InvalidArgument when it is larger than `bytes_max`.
StatusOr<std::string> ReadTextFile(const std::string& path, int64_t bytes_max);

}  // namespace pbs
