// Spec: server/base/shared_region.h.
#include "server/base/shared_region.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "absl/strings/str_cat.h"

namespace pbs::server {
namespace {

constexpr int64_t kBytes = 3 * 4096 + 100;  // the last page is not whole

class PeerMapping {
 public:
  explicit PeerMapping(const FileDescriptor& file)
      : data_(mmap(nullptr, kBytes, PROT_READ, MAP_SHARED, file.get(), 0)) {}
  ~PeerMapping() { munmap(data_, kBytes); }
  PeerMapping(const PeerMapping&) = delete;
  PeerMapping& operator=(const PeerMapping&) = delete;

  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(data_), kBytes};
  }

 private:
  void* const data_;
};

bool AllAre(std::span<const std::byte> bytes, std::byte value) {
  return std::all_of(bytes.begin(), bytes.end(),
                     [value](std::byte byte) { return byte == value; });
}

TEST(SharedRegionSpec, IsZeroedMemoryOfSealedSize) {
  const auto region = *SharedRegion::Create(kBytes);
  ASSERT_EQ(region->bytes().size(), static_cast<size_t>(kBytes));
  EXPECT_TRUE(AllAre(region->bytes(), std::byte{0}));
  const FileDescriptor file = *region->OpenReadOnly();
  constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  EXPECT_EQ(fcntl(file.get(), F_GET_SEALS), kSeals);
  struct stat info = {};
  ASSERT_EQ(fstat(file.get(), &info), 0);
  EXPECT_EQ(info.st_size, kBytes);
  EXPECT_EQ(info.st_mode & 07777, 0400u);
  EXPECT_NE(fcntl(file.get(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST(SharedRegionSpec, APeerSeesWhatTheOwnerWritesAndCannotWriteIt) {
  const auto region = *SharedRegion::Create(kBytes);
  const FileDescriptor file = *region->OpenReadOnly();
  const PeerMapping peer(file);
  std::memset(region->bytes().data(), 0x5A, kBytes);
  EXPECT_TRUE(AllAre(peer.bytes(), std::byte{0x5A}));
  EXPECT_EQ(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0),
            MAP_FAILED);
  EXPECT_EQ(errno, EACCES);
  EXPECT_EQ(pwrite(file.get(), "x", 1, 0), -1);
  EXPECT_EQ(ftruncate(file.get(), 0), -1);
  // Others than root cannot open it again for writing.
  const std::string path = absl::StrCat("/proc/self/fd/", file.get());
  const FileDescriptor again(open(path.c_str(), O_RDWR | O_CLOEXEC));
  EXPECT_EQ(again.is_open(), geteuid() == 0);
}

TEST(SharedRegionSpec, ItsEndFreesThePagesUnderEveryMappingWhichThenReadsZeros) {
  auto region = *SharedRegion::Create(kBytes);
  const FileDescriptor file = *region->OpenReadOnly();
  const PeerMapping peer(file);
  std::memset(region->bytes().data(), 0x5A, kBytes);
  struct stat info = {};
  ASSERT_EQ(fstat(file.get(), &info), 0);
  EXPECT_GE(info.st_blocks * 512, kBytes);
  region.reset();
  ASSERT_EQ(fstat(file.get(), &info), 0);
  EXPECT_EQ(info.st_blocks, 0);
  EXPECT_EQ(info.st_size, kBytes);
  EXPECT_TRUE(AllAre(peer.bytes(), std::byte{0}));
}

TEST(SharedRegionSpec, AnImpossibleSizeIsRefusedWithTheSize) {
  const auto region = SharedRegion::Create(INT64_MAX);
  EXPECT_TRUE(absl::IsResourceExhausted(region.status())) << region.status();
  EXPECT_NE(region.status().message().find("9223372036854775807 bytes"),
            std::string::npos)
      << region.status();
}

}  // namespace
}  // namespace pbs::server
