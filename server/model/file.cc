#include "server/model/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

namespace pbs {
namespace {

Status SystemError(const std::string& path, const char* verb) {
  const std::string message =
      "cannot " + std::string(verb) + " " + path + ": " + std::strerror(errno);
  return errno == ENOENT || errno == ENOTDIR ? NotFound(message)
                                             : FailedPrecondition(message);
}

// Why `path`, which cannot be opened, is not simply missing.
Status OpenError(const std::string& path) {
  Status error = SystemError(path, "open");
  if (error.code() != StatusCode::kNotFound) return error;
  char target[PATH_MAX];
  const ssize_t length = readlink(path.c_str(), target, sizeof(target));
  if (length < 0) return error;
  return InvalidArgument(path + " is a link to " +
                         std::string(target, static_cast<size_t>(length)) +
                         ", which does not exist: the download is incomplete; "
                         "download the model again");
}

// Git LFS leaves a text of three lines where a file has not been downloaded.
Status RefuseLfsPointer(const File& file) {
  constexpr std::string_view kBegin = "version https://git-lfs.github.com/spec/";
  constexpr int64_t kPointerBytesMax = 1024;  // by its specification
  char begin[kBegin.size()];
  if (file.size() > kPointerBytesMax ||
      file.size() < static_cast<int64_t>(kBegin.size())) {
    return OkStatus();
  }
  PBS_RETURN_IF_ERROR(file.ReadAt(0, static_cast<int64_t>(kBegin.size()), begin));
  if (std::string_view(begin, kBegin.size()) != kBegin) return OkStatus();
  return InvalidArgument(file.path() +
                         " is a Git LFS pointer, not the file itself: run `git lfs "
                         "pull` in its folder");
}

}  // namespace

StatusOr<File> File::Open(const std::string& path) {
  // Without O_NONBLOCK, opening a FIFO would wait for its writer.
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) return OpenError(path);
  File file(descriptor, 0, path);
  struct stat info = {};
  if (fstat(descriptor, &info) != 0) return SystemError(path, "examine");
  if (!S_ISREG(info.st_mode)) return InvalidArgument(path + " is not a regular file");
  file.size_ = info.st_size;
  PBS_RETURN_IF_ERROR(RefuseLfsPointer(file));
  return file;
}

File::File(File&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      size_(other.size_),
      path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(size_, other.size_);
  std::swap(path_, other.path_);
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

Status File::ReadAt(int64_t offset, int64_t bytes, void* target) const {
  constexpr int64_t kReadMax = 1 << 30;  // Linux returns short reads above 2 GiB
  auto* out = static_cast<char*>(target);
  while (bytes > 0) {
    const auto wanted = static_cast<size_t>(std::min(bytes, kReadMax));
    const ssize_t count = pread(descriptor_, out, wanted, offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return SystemError(path_, "read");
    if (count == 0) {
      return DataLoss(path_ + " ends at byte " + std::to_string(offset) + ", " +
                      std::to_string(bytes) + " bytes early: it has shrunk from " +
                      std::to_string(size_) + " bytes");
    }
    out += count;
    offset += count;
    bytes -= count;
  }
  return OkStatus();
}

StatusOr<std::string> ReadTextFile(const std::string& path, int64_t bytes_max) {
  PBS_ASSIGN_OR_RETURN(const File file, File::Open(path));
  if (file.size() > bytes_max) {
    return InvalidArgument(path + " has " + std::to_string(file.size()) +
                           " bytes, more than " + std::to_string(bytes_max));
  }
  std::string text(static_cast<size_t>(file.size()), '\0');
  PBS_RETURN_IF_ERROR(file.ReadAt(0, file.size(), text.data()));
  return text;
}

}  // namespace pbs
