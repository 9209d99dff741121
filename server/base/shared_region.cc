#include "server/base/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
// Below this a huge page would round the resident size up noticeably.
constexpr int64_t kHugePageBytesMin = 16 << 20;
// More than any machine has; sums with it do not overflow.
constexpr int64_t kBytesMax = int64_t{1} << 50;

// Frees all pages. A page that is not wholly inside the hole would only be cleared.
bool Punch(const FileDescriptor& file, int64_t bytes) {
  constexpr int64_t kPageBytesMax = 64 << 10;
  return fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                   bytes + kPageBytesMax - bytes % kPageBytesMax) == 0;
}

absl::Status Refused(int64_t bytes) {
  return absl::ResourceExhaustedError(
      absl::StrCat("cannot share ", bytes, " bytes of memory: ", std::strerror(errno)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<SharedRegion>> SharedRegion::Create(int64_t bytes) {
  PBS_CHECK(bytes >= 1);
  if (bytes > kBytesMax) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "cannot share ", bytes, " bytes of memory: they exceed ", kBytesMax));
  }
  FileDescriptor file(memfd_create("pbs-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  // No F_SEAL_WRITE and no F_SEAL_FUTURE_WRITE: with either of them pages could not be
  // taken away.
  if (!file.is_open() || ftruncate(file.get(), bytes) != 0 ||
      fcntl(file.get(), F_ADD_SEALS, kSeals) != 0 || fchmod(file.get(), S_IRUSR) != 0) {
    return Refused(bytes);
  }
  // Where pages cannot be taken away nothing must be shared.
  if (!Punch(file, bytes)) return Refused(bytes);
  const auto size = static_cast<size_t>(bytes);
  void* const data =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) return Refused(bytes);
  if (bytes >= kHugePageBytesMin) madvise(data, size, MADV_HUGEPAGE);  // advice only
  return std::unique_ptr<SharedRegion>(
      new SharedRegion(std::move(file), {static_cast<std::byte*>(data), size}));
}

SharedRegion::~SharedRegion() {
  PBS_CHECK(Punch(file_, static_cast<int64_t>(bytes_.size())));
  PBS_CHECK(munmap(bytes_.data(), bytes_.size()) == 0);
}

absl::StatusOr<FileDescriptor> SharedRegion::OpenReadOnly() const {
  const std::string path = absl::StrCat("/proc/self/fd/", file_.get());
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.is_open()) return file;
  return absl::ResourceExhaustedError(
      absl::StrCat("cannot open shared memory: ", std::strerror(errno)));
}

}  // namespace pbs::server
