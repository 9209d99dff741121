// BlockCache: keeps freed blocks of memory for the next upload.
//
// A new mapping costs a page fault and the clearing of each page. That takes longer
// than receiving the bytes, and far longer where a hypervisor reclaims freed pages. A
// kept block is marked as free for the system, which may take its pages when it needs
// them.
//
// Threading: safe from any thread. Memory: mappings of at most bytes_max bytes; it
// unmaps the oldest first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "server/base/mutex.h"

namespace pbs::server {

class BlockCache {
 public:
  explicit BlockCache(int64_t bytes_max) : bytes_max_(bytes_max) {}
  ~BlockCache();
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;

  // Takes out the smallest kept block of at least `size` and at most 1.25 `size` bytes.
  // Its contents are unspecified. Empty when there is none.
  std::span<std::byte> Take(int64_t size);
  // Keeps or unmaps a private anonymous mapping.
  void Keep(std::span<std::byte> block);

  int64_t bytes() const;

 private:
  const int64_t bytes_max_;
  mutable Mutex mutex_;
  std::vector<std::span<std::byte>> blocks_ ABSL_GUARDED_BY(mutex_);  // oldest first
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pbs::server
