// Spec: server/engine/held_kv.h.
#include "server/engine/held_kv.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "pbs/cpu_backend.h"

namespace pbs::server {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

class HeldKvSpec : public testing::Test {
 protected:
  std::shared_ptr<HeldKv> Make() {
    const KvShape shape = {.num_layers = 4,
                           .num_kv_heads = 1,
                           .head_dim = 32,
                           .capacity = 8,
                           .dtype = DType::kF32};
    return std::make_shared<HeldKv>(*KvCache::Create(shape, *backend_),
                                    *ledger_.Reserve(shape.bytes()));
  }
  WaiterId Wait(int32_t layer, const char* name) {
    return kv_->WhenReady(layer, [this, name] { called_.emplace_back(name); });
  }

  const std::unique_ptr<Backend> backend_ = *CreateCpuBackend({.num_threads = 1});
  ByteLedger ledger_{1 << 20};
  std::vector<std::string> called_;
  std::shared_ptr<HeldKv> kv_ = Make();
};

TEST_F(HeldKvSpec, BeginsWithNothingReady) {
  EXPECT_EQ(kv_->layers_ready(), 0);
  EXPECT_FALSE(kv_->finished());
  EXPECT_TRUE(kv_->status().ok());
}

TEST_F(HeldKvSpec, MayBeReadUntilItIsClosed) {
  kv_->Publish(2);
  Wait(2, "layer");
  Wait(kNoLayer, "end");
  EXPECT_TRUE(kv_->readable().ok());
  kv_->Close(absl::NotFoundError("gone"));
  EXPECT_THAT(called_, ElementsAre("layer", "end"));
  EXPECT_EQ(kv_->readable(), absl::NotFoundError("gone"));
  EXPECT_EQ(Wait(3, "late"), 0);
  EXPECT_EQ(called_.back(), "late");
  // Its writer does not notice, and the first reason counts.
  kv_->Publish(4);
  kv_->Finish(absl::OkStatus());
  kv_->Abandon();
  EXPECT_EQ(kv_->readable(), absl::NotFoundError("gone"));
  EXPECT_TRUE(kv_->status().ok());
}

TEST_F(HeldKvSpec, MayNotBeReadAfterItsPrefillFailed) {
  kv_->Publish(1);
  kv_->Finish(absl::InternalError("a device broke"));
  EXPECT_EQ(kv_->readable(),
            absl::UnavailableError("the prefill of this ticket ended early: INTERNAL"));
}

TEST_F(HeldKvSpec, MayNotBeReadWhenItsResultWasLost) {
  kv_->Finish(absl::OkStatus());
  EXPECT_TRUE(kv_->readable().ok());
  kv_->Abandon();
  EXPECT_TRUE(absl::IsUnavailable(kv_->readable()));
}

TEST_F(HeldKvSpec, NoLayerMeansTheEnd) {
  Wait(kNoLayer, "end");
  kv_->Publish(4);
  EXPECT_THAT(called_, IsEmpty());
  kv_->Finish(absl::OkStatus());
  EXPECT_THAT(called_, ElementsAre("end"));
}

TEST_F(HeldKvSpec, GivesItsBytesBackWithItsLastOwner) {
  std::shared_ptr<HeldKv> reader = kv_;
  EXPECT_EQ(ledger_.bytes_held(), reader->cache().shape().bytes());
  kv_.reset();
  EXPECT_GT(ledger_.bytes_held(), 0);
  reader.reset();
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

TEST_F(HeldKvSpec, CallsWaitersAsTheirLayersCome) {
  Wait(2, "c");
  Wait(0, "a");
  Wait(1, "b");
  EXPECT_THAT(called_, IsEmpty());
  kv_->Publish(1);
  EXPECT_THAT(called_, ElementsAre("a"));
  kv_->Publish(3);
  EXPECT_THAT(called_, ElementsAre("a", "c", "b"));
}

TEST_F(HeldKvSpec, CallsAtOnceForALayerThatIsReady) {
  kv_->Publish(2);
  EXPECT_EQ(Wait(1, "a"), 0u);
  EXPECT_THAT(called_, ElementsAre("a"));
  EXPECT_NE(Wait(2, "b"), 0u);
}

TEST_F(HeldKvSpec, CallsEverybodyWhenThePrefillFails) {
  Wait(3, "a");
  kv_->Finish(absl::CancelledError("stopped"));
  EXPECT_THAT(called_, ElementsAre("a"));
  EXPECT_TRUE(kv_->finished());
  EXPECT_EQ(kv_->status(), absl::CancelledError("stopped"));
  EXPECT_EQ(Wait(3, "b"), 0u);
  EXPECT_THAT(called_, ElementsAre("a", "b"));
}

TEST_F(HeldKvSpec, ACancelledWaiterIsNeverCalled) {
  const WaiterId id = Wait(1, "a");
  Wait(1, "b");
  EXPECT_TRUE(kv_->CancelWait(id));
  EXPECT_FALSE(kv_->CancelWait(id));
  EXPECT_FALSE(kv_->CancelWait(0));
  kv_->Publish(4);
  EXPECT_THAT(called_, ElementsAre("b"));
}

TEST_F(HeldKvSpec, ACallbackMayWaitForTheNextLayer) {
  kv_->WhenReady(0, [this] {
    called_.emplace_back("first");
    Wait(1, "second");
  });
  kv_->Publish(1);
  EXPECT_THAT(called_, ElementsAre("first"));
  kv_->Publish(2);
  EXPECT_THAT(called_, ElementsAre("first", "second"));
}

TEST_F(HeldKvSpec, DroppingItDropsWaitersUncalled) {
  Wait(0, "a");
  kv_.reset();
  EXPECT_THAT(called_, IsEmpty());
}

TEST_F(HeldKvSpec, EveryWaiterIsCalledOnceWhileLayersArePublished) {
  std::atomic<int> called = 0;
  std::vector<std::thread> readers;
  constexpr int kReaders = 3;
  constexpr int kWaitsEach = 200;
  for (int reader = 0; reader < kReaders; ++reader) {
    readers.emplace_back([this, &called] {
      for (int i = 0; i < kWaitsEach; ++i) kv_->WhenReady(i % 4, [&] { ++called; });
    });
  }
  for (int32_t layers = 1; layers <= 4; ++layers) kv_->Publish(layers);
  kv_->Finish(absl::OkStatus());
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(called.load(), kReaders * kWaitsEach);
}

}  // namespace
}  // namespace pbs::server
