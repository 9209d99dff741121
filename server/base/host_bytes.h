// HostBytes: a block of host memory for tensors.
//
// A large block is an anonymous mapping of its own, so that freeing it returns its
// pages to the operating system at once. Small blocks come from the heap.
//
// Threading: a value; as safe as std::unique_ptr.
// Memory: 64-byte aligned and, except from Reuse(), zero-filled. A mapping takes
// physical pages when it is first written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "absl/status/statusor.h"
#include "server/base/block_cache.h"

namespace pbs::server {

class HostBytes {
 public:
  static constexpr int64_t kAlignment = 64;        // bytes
  static constexpr int64_t kMappedMin = 64 << 10;  // bytes; smaller blocks: the heap

  // Empty; data() is null.
  HostBytes() = default;
  HostBytes(HostBytes&& other) noexcept { *this = std::move(other); }
  HostBytes& operator=(HostBytes&& other) noexcept;
  ~HostBytes() { Reset(); }

  // `size` zero bytes; 0 gives an empty block. Requires size >= 0. ResourceExhausted
  // when the system has no memory to give.
  static absl::StatusOr<HostBytes> Allocate(int64_t size);
  // As Allocate(), but the contents are unspecified: for blocks that are overwritten
  // whole. Large blocks come from `cache` and return to it; they keep it alive.
  static absl::StatusOr<HostBytes> Reuse(int64_t size,
                                         const std::shared_ptr<BlockCache>& cache);

  int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::span<std::byte> span() { return {data_, static_cast<size_t>(size_)}; }
  std::span<const std::byte> span() const {
    return {data_, static_cast<size_t>(size_)};
  }

  // Frees the block; empty afterwards.
  void Reset();

 private:
  HostBytes(std::byte* data, int64_t size) : data_(data), size_(size) {}

  std::byte* data_ = nullptr;
  int64_t size_ = 0;
  // The cache that the block returns to, and the size of the whole block.
  std::shared_ptr<BlockCache> cache_;
  int64_t capacity_ = 0;
};

}  // namespace pbs::server
