#include "common/host_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

namespace pbs {
namespace {

// Below this a huge page would round the resident size up noticeably.
constexpr int64_t kHugePageBufferMin = 16 << 20;

void Unmap(void*, void* data, int64_t bytes) {
  PBS_CHECK(munmap(data, static_cast<size_t>(bytes)) == 0);
}

}  // namespace

StatusOr<Buffer> AllocatePages(int64_t bytes) {
  PBS_CHECK(bytes >= 0);
  if (bytes == 0) return Buffer();
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return ResourceExhausted("cannot map " + std::to_string(bytes) +
                             " bytes of memory: " + std::strerror(errno));
  }
  if (bytes >= kHugePageBufferMin) {
    madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // advice only
  }
  return Buffer(data, bytes, Unmap, nullptr);
}

}  // namespace pbs
