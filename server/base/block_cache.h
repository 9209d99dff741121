// BlockCache: freed blocks of memory, kept for the next upload.
//
// A new mapping costs a page fault and a cleared page per page, which takes longer than
// receiving the bytes, and far longer where a hypervisor takes freed pages away. A kept
// block is marked free for the system, which takes its pages back when it needs them.
//
// Threading: safe from any thread. Memory: bytes_max of mappings; oldest go first.
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

  // The smallest kept block that has `size` bytes and at most a quarter more, with any
  // content; empty when there is none.
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
