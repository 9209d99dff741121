#include "server/base/host_bytes.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

// Huge pages take a third of the time to fill; below this size they would round the
// resident memory up noticeably.
constexpr int64_t kHugePagesMin = 16 << 20;

bool IsMapped(int64_t size) { return size >= HostBytes::kMappedMin; }

void* AllocateZeroed(int64_t size) {
  if (IsMapped(size)) {
    void* data = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    if (size >= kHugePagesMin) {
      madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // advice only
    }
    return data;
  }
  const auto rounded =
      static_cast<size_t>((size + HostBytes::kAlignment - 1) / HostBytes::kAlignment *
                          HostBytes::kAlignment);
  void* data = std::aligned_alloc(HostBytes::kAlignment, rounded);
  if (data != nullptr) std::memset(data, 0, rounded);
  return data;
}

}  // namespace

HostBytes& HostBytes::operator=(HostBytes&& other) noexcept {
  if (this != &other) {
    Reset();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    cache_ = std::move(other.cache_);
    capacity_ = std::exchange(other.capacity_, 0);
  }
  return *this;
}

absl::StatusOr<HostBytes> HostBytes::Allocate(int64_t size) {
  PBS_CHECK(size >= 0);
  if (size == 0) return HostBytes();
  void* data = AllocateZeroed(size);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the system refused ", size, " bytes of memory"));
  }
  return HostBytes(static_cast<std::byte*>(data), size);
}

absl::StatusOr<HostBytes> HostBytes::Reuse(int64_t size,
                                           const std::shared_ptr<BlockCache>& cache) {
  if (size < kHugePagesMin) return Allocate(size);
  const std::span<std::byte> kept = cache->Take(size);
  absl::StatusOr<HostBytes> bytes =
      kept.empty() ? Allocate(size) : HostBytes(kept.data(), size);
  if (!bytes.ok()) return bytes;
  bytes->cache_ = cache;
  bytes->capacity_ = kept.empty() ? size : static_cast<int64_t>(kept.size());
  return bytes;
}

void HostBytes::Reset() {
  if (data_ == nullptr) return;
  if (cache_ != nullptr) {
    cache_->Keep({data_, static_cast<size_t>(capacity_)});
  } else if (IsMapped(size_)) {
    munmap(data_, static_cast<size_t>(size_));
  } else {
    std::free(data_);
  }
  data_ = nullptr;
  size_ = 0;
  cache_.reset();
}

}  // namespace pbs::server
