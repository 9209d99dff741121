// Spec: the threading rules of server/transfer/lease_store.h and kv_exporter.h. For
// ThreadSanitizer: what the threads do is simple, that they do it at once is the point.
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "server/transfer/kv_exporter.h"
#include "server/transfer/lease_store.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

using testing_support::OneThreadBackend;

constexpr KvShape kShape = {4, 2, 32, 300, DType::kF32};
constexpr float kFirstValue = 1000;

std::shared_ptr<HeldKv> EmptyKv() {
  return std::make_shared<HeldKv>(*KvCache::Create(kShape, OneThreadBackend()),
                                  ByteReservation());
}

// Every plane holds one value of its own.
void FillAndPublish(HeldKv& kv) {
  for (int32_t layer = 0; layer < kShape.num_layers; ++layer) {
    const int64_t count = kShape.plane_bytes() / DTypeBytes(kShape.dtype);
    auto* k = static_cast<float*>(kv.writable_cache().k(layer));
    auto* v = static_cast<float*>(kv.writable_cache().v(layer));
    for (int64_t i = 0; i < count; ++i) {
      k[i] = kFirstValue + 2 * layer;
      v[i] = kFirstValue + 2 * layer + 1;
    }
    kv.Publish(layer + 1);
  }
  kv.Finish(absl::OkStatus());
}

// Elements that differ from what FillAndPublish() wrote.
int64_t WrongElements(const wire::KvChunk& chunk) {
  std::vector<float> values(chunk.payload.size() / sizeof(float));
  chunk.payload.CopyTo(reinterpret_cast<std::byte*>(values.data()));
  const float expected =
      kFirstValue + 2 * chunk.layer + (chunk.kind == v1::KvChunk::V ? 1 : 0);
  int64_t wrong = 0;
  for (float value : values) wrong += value != expected;
  return wrong;
}

TEST(KvThreadsSpec, ReadersFollowTheWriterLayerByLayer) {
  const std::shared_ptr<HeldKv> kv = EmptyKv();
  std::atomic<int64_t> wrong = 0;
  std::vector<std::thread> readers;
  for (KvLayout layout : {KvLayout::kHnd, KvLayout::kNhd, KvLayout::kHnd}) {
    readers.emplace_back([&wrong, kv, layout] {
      const auto exporter = KvExporter::Create(
          kv, 1, WholeRange(kShape), {.layout = layout, .chunk_bytes = 64 << 10});
      while (!(*exporter)->done()) {
        if ((*exporter)->layer() >= kv->layers_ready()) {
          std::this_thread::yield();
          continue;
        }
        wrong += WrongElements((*exporter)->Next());
      }
    });
  }
  FillAndPublish(*kv);
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(KvThreadsSpec, LeasesBeginEndAndExpireOnManyThreadsAndNoneIsLeft) {
  ManualClock clock;
  TimerQueue timers(clock);
  prometheus::Registry registry;
  KvMetrics metrics(registry);
  LeaseStore store({.ttl_seconds_default = 2}, /*epoch=*/1, clock, timers, metrics);
  constexpr int kClients = 4;
  constexpr int kLeasesEach = 100;
  std::atomic<int> working = kClients;
  std::vector<std::thread> clients;
  for (int client = 0; client < kClients; ++client) {
    clients.emplace_back([&] {
      for (int i = 0; i < kLeasesEach; ++i) {
        auto begun = store.Begin(LeaseRequest());
        PendingLease pending = std::move(begun->pending);
        pending.Attach(EmptyKv());
        if (i % 4 == 0) continue;  // its prefill dies
        EXPECT_TRUE(pending.Complete({}, {}).ok());
        // From here on the clock may end it at any moment.
        (void)store.Find(pending.ticket());
        if (i % 4 == 1) (void)store.Renew(pending.ticket(), 1);
        store.MarkExported(pending.ticket(), 1 << 20);
        if (i % 4 == 2) (void)store.Release(pending.ticket());
      }
      --working;
    });
  }
  while (working > 0) {
    clock.Advance(absl::Milliseconds(10));
    timers.RunDue();
    std::this_thread::yield();
  }
  for (std::thread& client : clients) client.join();
  clock.Advance(absl::Seconds(2));
  timers.RunDue();
  EXPECT_EQ(store.size(), 0);
  EXPECT_EQ(metrics.export_outstanding.Value(), 0);
}

}  // namespace
}  // namespace pbs::server
