// Spec: raw attention of server/engine/engine.h on a backend with memory of its own:
// tensors are uploaded while other jobs run, and whatever ends a job, nothing is given
// back before its copies have ended.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/device_backend.h"
#include "tests/unit/server/engine/engine_fixture.h"

namespace pbs::server {
namespace {

using testing_support::DeviceBackend;
using testing_support::DevicePlan;

constexpr int32_t kTokens = 100;
constexpr int32_t kHeadDim = 64;
// Of an upload: room for all tensors, then q, k and v.
constexpr int kUploads = 4;

bool Equal(const HostBytes& a, const HostBytes& b) {
  return a.size() == b.size() &&
         std::memcmp(a.data(), b.data(), static_cast<size_t>(a.size())) == 0;
}

// An engine on a device, and one on the CPU to compare with (EngineFixture's).
class DeviceAttendSpec : public EngineFixture {
 protected:
  void Open(DevicePlan plan = {}) {
    on_device_.reset();
    device_ = std::make_unique<DeviceBackend>(std::move(plan));
    on_device_ =
        std::make_unique<DeviceEngine>(EngineOptions{.queue_requests_max = kQueueMax},
                                       EngineParts{*device_, ledger_, clock_, timers_,
                                                   metrics_, costs_, &device_ledger_});
  }
  ~DeviceAttendSpec() override { EXPECT_EQ(device_ledger_.bytes_held(), 0); }

  AttendJob MakeJob(DeviceEngine& engine, uint32_t seed = 1) {
    AttendJob job;
    job.problem.shape = {2, 1, kHeadDim, {{kTokens, kTokens}}};
    job.problem.options = SmallPbs();
    job.wanted = {true, true, true};
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (auto [rows, heads] : {std::pair{&job.q, 2}, {&job.k, 1}, {&job.v, 1}}) {
      rows->bytes = *HostBytes::Allocate(int64_t{heads} * kTokens * kHeadDim * 4);
      auto* values = reinterpret_cast<float*>(rows->bytes.data());
      for (int i = 0; i < heads * kTokens * kHeadDim; ++i) values[i] = normal(random);
      rows->layout = PackedLayout(kTokens, kHeadDim);
    }
    job.o_layout = PackedLayout(kTokens, kHeadDim);
    job.lse_layout = PackedLayout(kTokens, 1);
    job.reservation = *engine.ReserveAttend(job.problem, job.wanted);
    return job;
  }
  JobId Submit(AttendListener& listener, uint32_t seed = 1) {
    const auto admission =
        on_device_->SubmitAttend(MakeJob(*on_device_, seed), listener);
    EXPECT_TRUE(admission.ok()) << admission.status();
    return admission->id;
  }
  static void Run(DeviceEngine& engine) {
    while (engine.executor().RunOneStep()) {
    }
  }
  // What was given to the device's thread of uploads so far has been done.
  void WaitForUploads() {
    std::promise<void> reached;
    device_->uploads().Add([&] { reached.set_value(); });
    reached.get_future().wait();
  }
  // Runs `job` on both engines; the CPU's result.
  AttendResult ExpectTheCpusBits(const std::function<AttendJob(DeviceEngine&)>& make) {
    AttendRecorder actual, expected;
    EXPECT_TRUE(on_device_->SubmitAttend(make(*on_device_), actual).ok());
    Run(*on_device_);
    EXPECT_TRUE(engine_.SubmitAttend(make(engine_), expected).ok());
    Run(engine_);
    EXPECT_TRUE(actual.result.ok()) << actual.result.status();
    EXPECT_TRUE(Equal(actual.result->o, expected.result->o));
    EXPECT_TRUE(Equal(actual.result->lse, expected.result->lse));
    EXPECT_EQ(actual.result->report.order, expected.result->report.order);
    EXPECT_EQ(actual.result->report.lists.indices,
              expected.result->report.lists.indices);
    EXPECT_EQ(device_ledger_.bytes_held(), 0);
    return *std::move(expected.result);
  }

  static constexpr int64_t kDeviceBytesMax = 64 << 20;
  ByteLedger device_ledger_{kDeviceBytesMax};
  std::unique_ptr<DeviceBackend> device_;
  std::unique_ptr<DeviceEngine> on_device_;
  AttendRecorder listener_;
};

TEST_F(DeviceAttendSpec, GivesTheCpusBits) {
  Open();
  ExpectTheCpusBits([&](DeviceEngine& engine) { return MakeJob(engine); });
}

TEST_F(DeviceAttendSpec, ReadsGivenOrdersAndLists) {
  Open();
  const AttendResult chosen =
      ExpectTheCpusBits([&](DeviceEngine& engine) { return MakeJob(engine); });
  const auto& order = chosen.report.order;
  const auto order_bytes = static_cast<int64_t>(order.size() * sizeof(int32_t));
  const AttendResult again = ExpectTheCpusBits([&](DeviceEngine& engine) {
    AttendJob job = MakeJob(engine);
    job.problem.options.use_given_order = job.problem.options.use_given_lists = true;
    job.reservation = *engine.ReserveAttend(job.problem, job.wanted);
    job.order = {*HostBytes::Allocate(order_bytes), PackedLayout(kTokens, 1)};
    std::memcpy(job.order.bytes.data(), order.data(), static_cast<size_t>(order_bytes));
    job.lists = chosen.report.lists;
    return job;
  });
  EXPECT_TRUE(Equal(again.o, chosen.o));
}

// The step of the first job is held until the tensors of the second have arrived.
TEST_F(DeviceAttendSpec, TensorsOfAWaitingJobArriveWhileAnotherOneRuns) {
  std::promise<void> step_began, all_uploaded;
  std::promise<void> go_on;
  std::atomic<int> uploads = 0;
  std::atomic<bool> is_first = true;
  Open({.on_run =
            [&] {
              if (!is_first.exchange(false)) return;
              step_began.set_value();
              go_on.get_future().wait();
            },
        .on_uploaded =
            [&] {
              if (++uploads == 2 * kUploads) all_uploaded.set_value();
            }});
  Submit(listener_);
  std::thread executor([this] { on_device_->executor().RunOneStep(); });
  step_began.get_future().wait();
  AttendRecorder second;
  Submit(second, 2);
  all_uploaded.get_future().wait();
  EXPECT_EQ(listener_.num_done, 0);
  go_on.set_value();
  executor.join();
  Run(*on_device_);
  ASSERT_TRUE(listener_.result.ok()) << listener_.result.status();
  ASSERT_TRUE(second.result.ok()) << second.result.status();
  EXPECT_EQ(uploads, 2 * kUploads);

  AttendRecorder expected;
  ASSERT_TRUE(engine_.SubmitAttend(MakeJob(engine_, 2), expected).ok());
  Run(engine_);
  EXPECT_TRUE(Equal(second.result->o, expected.result->o));
}

// Held before anything, when there is room, and when q has arrived.
TEST_F(DeviceAttendSpec, ACancelledJobGivesBackItsInputsWhenItsCopiesHaveEnded) {
  for (const auto& [uploads_before, uploads_in_all] :
       {std::pair{0, 1}, {1, 1 + DeviceUploads::kPartsUnderWay}, {2, kUploads}}) {
    SCOPED_TRACE(uploads_before);
    std::atomic<int> uploads = 0;
    std::promise<void> held;
    Open({.on_uploaded = [&, before = uploads_before] {
      if (++uploads == before) held.set_value();
    }});
    device_->uploads().HoldAfter(uploads_before);
    AttendRecorder listener;
    const JobId id = Submit(listener);
    if (uploads_before > 0) held.get_future().wait();
    on_device_->Cancel(id, CancelReason::kCaller);
    EXPECT_EQ(listener.result.status().code(), absl::StatusCode::kCancelled);
    EXPECT_EQ(listener.num_done, 1);
    const int64_t inputs = int64_t{4} * kTokens * kHeadDim * 4;
    EXPECT_EQ(device_ledger_.bytes_held(), inputs);
    EXPECT_EQ(ledger_.bytes_held(), inputs);
    device_->uploads().Release();
    WaitForUploads();
    EXPECT_EQ(device_ledger_.bytes_held(), 0);
    EXPECT_EQ(ledger_.bytes_held(), 0);
    EXPECT_EQ(uploads, uploads_in_all);  // what had not begun was left out
  }
}

TEST_F(DeviceAttendSpec, AStepThatWaitsForItsTensorsCanBeCancelled) {
  std::promise<void> step_began;
  std::atomic<bool> is_first = true;
  Open({.on_allocate = [&] {
    if (is_first.exchange(false)) step_began.set_value();
  }});
  device_->uploads().HoldAfter(0);
  const JobId id = Submit(listener_);
  std::thread executor([this] { Run(*on_device_); });
  step_began.get_future().wait();
  on_device_->Cancel(id, CancelReason::kCaller);
  device_->uploads().Release();
  executor.join();
  EXPECT_EQ(listener_.result.status().code(), absl::StatusCode::kCancelled);
  on_device_.reset();
  EXPECT_EQ(device_ledger_.bytes_held(), 0);
}

TEST_F(DeviceAttendSpec, TheEndWaitsForCopiesUnderWay) {
  Open();
  device_->uploads().HoldAfter(1);
  const JobId id = Submit(listener_);
  on_device_->Cancel(id, CancelReason::kCaller);
  std::thread releaser([this] { device_->uploads().Release(); });
  on_device_.reset();
  EXPECT_EQ(device_ledger_.bytes_held(), 0);
  EXPECT_EQ(ledger_.bytes_held(), 0);
  releaser.join();
}

TEST_F(DeviceAttendSpec, AFailedUploadEndsItsJobOnly) {
  for (int fails_at = 1; fails_at <= 2 * kUploads; ++fails_at) {
    SCOPED_TRACE(fails_at);
    Open({.upload_fails_at = fails_at});
    std::array<AttendRecorder, 2> recorders;
    for (AttendRecorder& recorder : recorders) Submit(recorder);
    Run(*on_device_);
    int failed = 0;
    for (const AttendRecorder& recorder : recorders) {
      EXPECT_EQ(recorder.num_done, 1);
      if (recorder.result.ok()) continue;
      ++failed;
      EXPECT_EQ(recorder.result.status(),
                absl::UnavailableError("an upload failed, as it was told to"));
    }
    EXPECT_EQ(failed, 1);
    EXPECT_EQ(device_ledger_.bytes_held(), 0);
  }
}

TEST_F(DeviceAttendSpec, ARefusedJobUploadsNothingAndIsFreeAtOnce) {
  std::atomic<int> uploads = 0;
  Open({.on_uploaded = [&] { ++uploads; }});
  on_device_->Drain([] {});
  AttendJob job = MakeJob(*on_device_);
  EXPECT_EQ(on_device_->SubmitAttend(std::move(job), listener_).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(device_ledger_.bytes_held(), 0);
  EXPECT_EQ(ledger_.bytes_held(), 0);
  WaitForUploads();
  EXPECT_EQ(uploads, 0);
}

// Counts; the result goes at once.
struct CountingListener final : AttendListener {
  void OnDone(absl::StatusOr<AttendResult> result) override {
    ++(result.ok() ? num_ok : num_failed);
  }
  std::atomic<int> num_ok = 0, num_failed = 0;
};

TEST_F(DeviceAttendSpec, ManyClientsThatCancelLeaveNothing) {
  constexpr int kClients = 3;
  constexpr int kJobs = 20;
  Open();
  std::array<CountingListener, kClients> listeners;
  std::atomic<int> accepted = 0;
  {
    ExecutorThread executor(on_device_->executor());
    std::vector<std::thread> clients;
    for (CountingListener& listener : listeners) {
      clients.emplace_back([&, seed = static_cast<uint32_t>(clients.size())] {
        for (uint32_t i = 0; i < kJobs; ++i) {
          const auto admission =
              on_device_->SubmitAttend(MakeJob(*on_device_, seed), listener);
          if (!admission.ok()) continue;
          ++accepted;
          if (i % 3 != 0) on_device_->Cancel(admission->id, CancelReason::kCaller);
        }
      });
    }
    for (std::thread& client : clients) client.join();
    std::promise<void> idle;
    on_device_->Drain([&] { idle.set_value(); });
    idle.get_future().wait();
  }
  int done = 0;
  for (const CountingListener& listener : listeners) {
    done += listener.num_ok + listener.num_failed;
  }
  EXPECT_GT(done, 0);
  EXPECT_EQ(done, accepted);
  on_device_.reset();
  EXPECT_EQ(device_ledger_.bytes_held(), 0);
  EXPECT_EQ(ledger_.bytes_held(), 0);
}

}  // namespace
}  // namespace pbs::server
