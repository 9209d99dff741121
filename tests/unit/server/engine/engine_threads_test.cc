// Spec: server/engine/engine.h under load: whoever submits, cancels and drains, every
// accepted job completes once and nothing stays held.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <future>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

class CountingListener final : public PrefillListener {
 public:
  explicit CountingListener(std::atomic<int>& done) : done_(done) {}
  void OnLayerDone(int32_t, double, double) override {}
  void OnDone(absl::StatusOr<PrefillResult>) override {
    EXPECT_FALSE(called_.exchange(true));
    ++done_;
  }

 private:
  std::atomic<int>& done_;
  std::atomic<bool> called_ = false;
};

class EngineThreads : public EngineFixture {
 protected:
  // Submits prefills, cancels some of them, follows the cache of others.
  void RunClient(int client) {
    for (int i = 0; i < kPrefillsPerClient; ++i) {
      auto reserved = engine_.ReservePrefill(TestModel::Get(), {40, SmallPbs()});
      if (!reserved.ok()) continue;
      PrefillJob job;
      job.model = &TestModel::Get();
      job.tokens = Tokens(40);
      job.terms.priority = i % 2;
      job.kv = reserved->kv;
      job.reservation = std::move(reserved->workspace);
      if (i % 3 == 0) reserved->kv->WhenReady(1, [this] { ++followed_; });
      PrefillListener& listener = NewListener();
      const auto admission = engine_.SubmitPrefill(std::move(job), listener);
      if (!admission.ok()) continue;
      ++accepted_;
      if ((i + client) % 4 == 0) engine_.Cancel(admission->id, CancelReason::kCaller);
    }
  }

  PrefillListener& NewListener() {
    MutexLock lock(mutex_);
    listeners_.push_back(std::make_unique<CountingListener>(done_));
    return *listeners_.back();
  }

  static constexpr int kClients = 3;
  static constexpr int kPrefillsPerClient = 20;

  std::atomic<int> accepted_ = 0;
  std::atomic<int> done_ = 0;
  std::atomic<int> followed_ = 0;
  Mutex mutex_;
  std::vector<std::unique_ptr<CountingListener>> listeners_ ABSL_GUARDED_BY(mutex_);
};

TEST_F(EngineThreads, EveryAcceptedPrefillCompletesOnceAndFreesEverything) {
  std::promise<void> idle;
  {
    ExecutorThread thread(engine_.executor());
    std::vector<std::thread> clients;
    for (int client = 0; client < kClients; ++client) {
      clients.emplace_back([this, client] { RunClient(client); });
    }
    for (std::thread& client : clients) client.join();
    engine_.Drain([&] { idle.set_value(); });
    idle.get_future().wait();
    EXPECT_EQ(done_.load(), accepted_.load());
  }
  EXPECT_GT(accepted_.load(), 0);
  EXPECT_EQ(ledger_.bytes_held(), 0);
  EXPECT_EQ(metrics_.kv.Held(Tier::kHost).Value(), 0);
  EXPECT_EQ(metrics_.engine.backlog_tokens.Value(), 0);
}

TEST_F(EngineThreads, StoppingTheThreadCompletesWhatIsLeft) {
  {
    ExecutorThread thread(engine_.executor());
    for (int i = 0; i < kQueueMax; ++i) {
      if (engine_.SubmitPrefill(MakePrefill(40), NewListener()).ok()) ++accepted_;
    }
  }
  EXPECT_EQ(done_.load(), accepted_.load());
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

}  // namespace
}  // namespace pbs::server
