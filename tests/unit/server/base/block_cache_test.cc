// Spec: server/base/block_cache.h, and HostBytes::Reuse().
#include "server/base/block_cache.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "server/base/host_bytes.h"

namespace pbs::server {
namespace {

constexpr int64_t kMiB = 1 << 20;

// Frees a block of `size` into `cache`; says where it was.
const std::byte* UseOnce(const std::shared_ptr<BlockCache>& cache, int64_t size) {
  const HostBytes bytes = *HostBytes::Reuse(size, cache);
  return bytes.data();
}

TEST(BlockCacheSpec, AFreedBlockServesTheNextOfItsSize) {
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  const std::byte* first = UseOnce(cache, 32 * kMiB);
  EXPECT_EQ(cache->bytes(), 32 * kMiB);
  const HostBytes next = *HostBytes::Reuse(32 * kMiB, cache);
  EXPECT_EQ(next.data(), first);
  EXPECT_EQ(cache->bytes(), 0);
}

TEST(BlockCacheSpec, AReusedBlockIsWritableAndOfTheAskedSize) {
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  UseOnce(cache, 32 * kMiB);
  HostBytes bytes = *HostBytes::Reuse(30 * kMiB - 5, cache);
  ASSERT_EQ(bytes.size(), 30 * kMiB - 5);
  std::memset(bytes.data(), 7, static_cast<size_t>(bytes.size()));
  EXPECT_EQ(bytes.data()[bytes.size() - 1], std::byte{7});
  bytes.Reset();
  EXPECT_EQ(cache->bytes(), 32 * kMiB);  // whole, however little of it was used
}

TEST(BlockCacheSpec, BlocksMuchLargerThanAskedStay) {
  const auto cache = std::make_shared<BlockCache>(128 * kMiB);
  const std::byte* large = UseOnce(cache, 60 * kMiB);
  const HostBytes small = *HostBytes::Reuse(20 * kMiB, cache);
  EXPECT_NE(small.data(), large);
  EXPECT_EQ(cache->bytes(), 60 * kMiB);
}

TEST(BlockCacheSpec, TheSmallestThatFitsIsTaken) {
  const auto cache = std::make_shared<BlockCache>(128 * kMiB);
  {
    const HostBytes a = *HostBytes::Reuse(24 * kMiB, cache);
    const HostBytes b = *HostBytes::Reuse(22 * kMiB, cache);
    const HostBytes c = *HostBytes::Reuse(19 * kMiB, cache);
  }
  EXPECT_EQ(cache->Take(20 * kMiB).size(), static_cast<size_t>(22 * kMiB));
}

TEST(BlockCacheSpec, TheOldestGoWhenItIsFull) {
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  {
    const HostBytes a = *HostBytes::Reuse(40 * kMiB, cache);  // freed last
    const HostBytes b = *HostBytes::Reuse(20 * kMiB, cache);
    const HostBytes c = *HostBytes::Reuse(30 * kMiB, cache);  // freed first
  }
  EXPECT_EQ(cache->bytes(), 60 * kMiB);
  EXPECT_TRUE(cache->Take(30 * kMiB).empty());
}

TEST(BlockCacheSpec, ABlockLargerThanTheCacheIsFreed) {
  const auto cache = std::make_shared<BlockCache>(32 * kMiB);
  UseOnce(cache, 33 * kMiB);
  EXPECT_EQ(cache->bytes(), 0);
}

TEST(BlockCacheSpec, SmallBlocksAreNotKept) {
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  UseOnce(cache, kMiB);
  EXPECT_EQ(cache->bytes(), 0);
}

TEST(BlockCacheSpec, MovingABlockMovesItsWayBack) {
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  HostBytes target;
  {
    HostBytes source = *HostBytes::Reuse(32 * kMiB, cache);
    target = std::move(source);
  }
  EXPECT_EQ(cache->bytes(), 0);
  target.Reset();
  EXPECT_EQ(cache->bytes(), 32 * kMiB);
}

TEST(BlockCacheSpec, ABlockKeepsItsCacheAlive) {
  auto cache = std::make_shared<BlockCache>(64 * kMiB);
  const std::weak_ptr<BlockCache> seen = cache;
  HostBytes bytes = *HostBytes::Reuse(32 * kMiB, cache);
  cache.reset();
  EXPECT_FALSE(seen.expired());
  std::memset(bytes.data(), 1, static_cast<size_t>(bytes.size()));
  bytes.Reset();
  EXPECT_TRUE(seen.expired());
}

TEST(BlockCacheSpec, ThreadsShareIt) {
  const auto cache = std::make_shared<BlockCache>(64 * kMiB);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&cache, i] {
      for (int round = 0; round < 50; ++round) {
        HostBytes bytes = *HostBytes::Reuse((16 + i) * kMiB, cache);
        bytes.data()[round] = std::byte{1};
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(cache->bytes(), 64 * kMiB);
}

}  // namespace
}  // namespace pbs::server
