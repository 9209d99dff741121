// Spec: server/service/memory_formula.h.
#include "server/service/memory_formula.h"

#include <gtest/gtest.h>
#include <cstdint>

namespace pbs::server {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kKiB = 1 << 10;

TEST(MemoryFormulaSpec, TheLongestMessageIsAChunkOrAPrompt) {
  EXPECT_EQ(ReceiveMessageBytesMax(1), 4 * kMiB + 64 * kKiB);
  EXPECT_EQ(ReceiveMessageBytesMax(1 << 20), 5 * kMiB + 64 * kKiB);
}

TEST(MemoryFormulaSpec, FewStreamsAreBoundedByTheirWindowsAndMessages) {
  const TransportOptions options = {.concurrent_streams_max = 8,
                                    .memory_quota_bytes = 1024 * kMiB,
                                    .stream_window_bytes = 1 << 20};
  EXPECT_EQ(TransportBytesMax(options, 1, 2),
            16 * (1 * kMiB + 4 * kMiB + 64 * kKiB) + 16 * 64 * kKiB);
}

TEST(MemoryFormulaSpec, ManyStreamsAreBoundedByTheQuota) {
  const TransportOptions options;  // 64 streams a connection, 256 MiB
  EXPECT_EQ(TransportBytesMax(options, 1 << 20, 4), 256 * kMiB + 256 * 64 * kKiB);
  EXPECT_EQ(TransportBytesMax(options, 1 << 20, 400), 256 * kMiB + 25600 * 64 * kKiB);
}

}  // namespace
}  // namespace pbs::server
