#include "server/base/block_cache.h"

#include <sys/mman.h>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace pbs::server {

BlockCache::~BlockCache() {
  for (const auto& block : blocks_) munmap(block.data(), block.size());
}

std::span<std::byte> BlockCache::Take(int64_t size) {
  const auto least = static_cast<size_t>(size);
  const size_t most = least + least / 4;
  MutexLock lock(mutex_);
  auto best = blocks_.end();
  for (auto at = blocks_.begin(); at != blocks_.end(); ++at) {
    if (at->size() < least || at->size() > most) continue;
    if (best == blocks_.end() || at->size() < best->size()) best = at;
  }
  if (best == blocks_.end()) return {};
  const std::span<std::byte> block = *best;
  blocks_.erase(best);
  bytes_ -= static_cast<int64_t>(block.size());
  return block;
}

void BlockCache::Keep(std::span<std::byte> block) {
  const auto size = static_cast<int64_t>(block.size());
  if (size > bytes_max_ ||
      madvise(block.data(), block.size(), MADV_FREE) != 0) {  // of old kernels
    munmap(block.data(), block.size());
    return;
  }
  std::vector<std::span<std::byte>> evicted;
  {
    MutexLock lock(mutex_);
    auto end = blocks_.begin();
    for (; bytes_ + size > bytes_max_; ++end) {
      bytes_ -= static_cast<int64_t>(end->size());
    }
    evicted.assign(blocks_.begin(), end);
    blocks_.erase(blocks_.begin(), end);
    blocks_.push_back(block);
    bytes_ += size;
  }
  for (const auto& old : evicted) munmap(old.data(), old.size());
}

int64_t BlockCache::bytes() const {
  MutexLock lock(mutex_);
  return bytes_;
}

}  // namespace pbs::server
