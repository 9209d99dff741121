// Spec: server/engine/replicated_engine.h, on devices with memory of their own.
#include "server/engine/replicated_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <set>

#include "server/engine/prefill_task.h"
#include "tests/support/device_backend.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;
using testing_support::DeviceBackend;

constexpr int kReplicas = 3;
constexpr int64_t kDeviceBytesMax = 1 << 20;

class ReplicatedEngineSpec : public EngineFixture {
 protected:
  ReplicatedEngineSpec() {
    model_.name = "tiny";
    std::vector<DeviceEngine*> engines;
    for (int32_t i = 0; i < kReplicas; ++i) {
      auto& replica = replicas_[static_cast<size_t>(i)];
      model_.replicas.push_back(*Model::Load(folder_.path(), {}, replica.backend));
      replica.engine = std::make_unique<DeviceEngine>(
          EngineOptions{.queue_requests_max = kQueueMax},
          EngineParts{replica.backend, ledger_, clock_, timers_, metrics_, costs_,
                      &replica.ledger, i});
      engines.push_back(replica.engine.get());
    }
    model_.tokens_max = model_.model().config().max_tokens;
    replicated_.emplace(engines, metrics_.engine);
  }
  ~ReplicatedEngineSpec() override {
    for (const auto& replica : replicas_) EXPECT_EQ(replica.ledger.bytes_held(), 0);
  }

  PrefillJob Reserved(int32_t num_tokens) {
    PrefillJob job;
    job.model = &model_;
    job.tokens = Tokens(num_tokens);
    auto reserved = replicated_->ReservePrefill(model_, {num_tokens, Dense()});
    EXPECT_TRUE(reserved.ok()) << reserved.status();
    job.kv = std::move(reserved->kv);
    job.reservation = std::move(reserved->workspace);
    return job;
  }
  // Where the job went.
  int32_t Submit(int32_t num_tokens, PrefillRecorder& listener) {
    PrefillJob job = Reserved(num_tokens);
    const int32_t replica = job.reservation.replica;
    const auto admission = replicated_->SubmitPrefill(std::move(job), listener);
    EXPECT_TRUE(admission.ok()) << admission.status();
    ids_.push_back(admission->id);
    return replica;
  }
  Executor& ExecutorOf(int32_t replica) {
    return replicas_[static_cast<size_t>(replica)].engine->executor();
  }
  void RunAllReplicas() {
    for (int32_t i = 0; i < kReplicas; ++i) {
      while (ExecutorOf(i).RunOneStep()) {
      }
    }
  }
  // Prefills have a price from now on: a second for 100 tokens.
  void Learn() {
    costs_.Measure(PrefillCostKey(model_, Dense()), PrefillWork(100), {1, 0},
                   clock_.Now());
  }

  struct Replica {
    DeviceBackend backend;
    ByteLedger ledger{kDeviceBytesMax};
    std::unique_ptr<DeviceEngine> engine;
  };
  testing_support::TinyModelFolder folder_;
  std::array<Replica, kReplicas> replicas_;
  ServedModel model_;
  std::optional<ReplicatedEngine> replicated_;
  std::vector<JobId> ids_;
  PrefillRecorder a_, b_, c_, d_;
};

TEST_F(ReplicatedEngineSpec, UnpredictedJobsSpreadByNumber) {
  EXPECT_EQ(Submit(10, a_), 0);
  EXPECT_EQ(Submit(10, b_), 1);
  EXPECT_EQ(Submit(10, c_), 2);
  EXPECT_EQ(Submit(10, d_), 0);
  EXPECT_EQ(std::set<JobId>(ids_.begin(), ids_.end()).size(), 4u);
  EXPECT_EQ(metrics_.engine.waiting.Value(), 4);
  RunAllReplicas();
  for (const PrefillRecorder* recorder : {&a_, &b_, &c_, &d_}) {
    EXPECT_TRUE(recorder->result.ok()) << recorder->result.status();
  }
  EXPECT_EQ(metrics_.engine.waiting.Value(), 0);
  EXPECT_EQ(metrics_.engine.running.Value(), 0);
}

TEST_F(ReplicatedEngineSpec, TheLeastPredictedBacklogTakesAJob) {
  Learn();
  EXPECT_EQ(Submit(80, a_), 0);
  EXPECT_EQ(Submit(20, b_), 1);
  EXPECT_EQ(Submit(30, c_), 2);
  EXPECT_EQ(Submit(20, d_), 1);  // .2 s ahead of it, not .8 or .3
  RunAllReplicas();
}

TEST_F(ReplicatedEngineSpec, WhatIsReservedButNotSubmittedCounts) {
  PrefillJob first = Reserved(10);
  PrefillJob second = Reserved(10);
  EXPECT_EQ(first.reservation.replica, 0);
  EXPECT_EQ(second.reservation.replica, 1);
}

TEST_F(ReplicatedEngineSpec, ADeviceWithoutRoomIsPassedOver) {
  auto filled = *replicas_[0].ledger.Reserve(kDeviceBytesMax);
  auto filled_too = *replicas_[1].ledger.Reserve(kDeviceBytesMax);
  EXPECT_EQ(Submit(10, a_), 2);
  RunAllReplicas();
  auto filled_last = *replicas_[2].ledger.Reserve(kDeviceBytesMax);
  const auto refused = replicated_->ReservePrefill(model_, {10, Dense()});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(metrics_.engine.Rejected(RejectReason::kMemory).Value(), 1);
}

TEST_F(ReplicatedEngineSpec, WhatFitsNoDeviceIsRefusedOnce) {
  const auto refused = replicated_->ReservePrefill(model_, {2000, Dense()});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("memory_bytes_max 1048576"));
  EXPECT_EQ(metrics_.engine.Rejected(RejectReason::kTooLarge).Value(), 1);
}

TEST_F(ReplicatedEngineSpec, WhatIsTooLargeForOneDeviceGoesToALargerOne) {
  ASSERT_TRUE(replicas_[0].ledger.Withhold(kDeviceBytesMax - 1000).ok());
  ASSERT_TRUE(replicas_[2].ledger.Withhold(kDeviceBytesMax - 1000).ok());
  EXPECT_EQ(Submit(10, a_), 1);
  EXPECT_EQ(metrics_.engine.Rejected(RejectReason::kTooLarge).Value(), 0);
  auto filled = *replicas_[1].ledger.Reserve(replicas_[1].ledger.bytes_max() -
                                             replicas_[1].ledger.bytes_held());
  const auto later = replicated_->ReservePrefill(model_, {10, Dense()});
  EXPECT_EQ(later.status().code(), absl::StatusCode::kResourceExhausted)
      << "one of them will have room";
  RunAllReplicas();
}

TEST_F(ReplicatedEngineSpec, CancelFindsTheJobsReplica) {
  Submit(10, a_);
  Submit(10, b_);
  replicated_->Cancel(ids_[1], CancelReason::kCaller);
  EXPECT_EQ(b_.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(a_.num_done, 0);
  RunAllReplicas();
  EXPECT_TRUE(a_.result.ok());
}

TEST_F(ReplicatedEngineSpec, RawAttentionTakesItsTurnToo) {
  AttentionProblem problem;
  problem.shape = {2, 1, 64, {{100, 100}}};
  problem.options = Dense();
  Submit(10, a_);
  const auto reserved = replicated_->ReserveAttend(problem, {});
  ASSERT_TRUE(reserved.ok()) << reserved.status();
  EXPECT_EQ(reserved->replica, 1);
  RunAllReplicas();
}

TEST_F(ReplicatedEngineSpec, DrainWaitsForEveryReplica) {
  Submit(10, a_);
  Submit(10, b_);
  int idle = 0;
  replicated_->Drain([&] { ++idle; });
  while (ExecutorOf(0).RunOneStep()) {
  }
  EXPECT_EQ(idle, 0);
  PrefillJob late = Reserved(10);
  EXPECT_EQ(replicated_->SubmitPrefill(std::move(late), c_).status().code(),
            absl::StatusCode::kUnavailable);
  RunAllReplicas();
  EXPECT_EQ(idle, 1);
  replicated_->Drain([&] { ++idle; });
  EXPECT_EQ(idle, 2) << "nothing runs";
}

TEST_F(ReplicatedEngineSpec, ShutdownCutsAllAndSaysHowMany) {
  Submit(10, a_);
  Submit(10, b_);
  EXPECT_EQ(replicated_->Shutdown(), 2);
  EXPECT_EQ(a_.result.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(b_.result.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace pbs::server
