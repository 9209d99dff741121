#include "client/cpp/bench/page_buffer.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pbs::bench {

absl::StatusOr<PageBuffer> PageBuffer::Allocate(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes);
  if (size == 0) return PageBuffer();
  void* data =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the system refused ", bytes, " bytes of memory"));
  }
  madvise(data, size, MADV_HUGEPAGE);  // advice only
  std::memset(data, 0, size);
  return PageBuffer({static_cast<std::byte*>(data), size});
}

PageBuffer& PageBuffer::operator=(PageBuffer&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

PageBuffer::~PageBuffer() {
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

}  // namespace pbs::bench
