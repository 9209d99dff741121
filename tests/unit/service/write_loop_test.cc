// Spec: server/service/write_loop.h, task_pool.h and call_guard.h.
#include "server/service/write_loop.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "server/service/call_guard.h"
#include "server/service/task_pool.h"

namespace pbs::server {
namespace {

grpc::ByteBuffer Message(const std::string& text) {
  const grpc::Slice slice(text);
  return {&slice, 1};
}

// A stream whose test hands out messages and confirms writes.
class FakeStream final : public WriteLoop::Stream {
 public:
  NextWrite Next() override {
    EXPECT_FALSE(in_next_.exchange(true)) << "Next() ran twice at once";
    MutexLock lock(mutex_);
    in_next_ = false;
    next_thread_ = std::this_thread::get_id();
    if (!messages_.empty()) {
      grpc::ByteBuffer message = Message(messages_.front());
      messages_.erase(messages_.begin());
      return NextWrite::Message(std::move(message));
    }
    if (end_.has_value()) return NextWrite::End(*end_);
    return NextWrite::Wait();
  }
  void OnBroken() override {
    MutexLock lock(mutex_);
    messages_.clear();
    end_ = absl::CancelledError("broken");
  }
  void Send(const grpc::ByteBuffer* message) override {
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(message->Dump(&slices).ok());
    MutexLock lock(mutex_);
    sent_.emplace_back(slices[0].begin(), slices[0].end());
    changed_.NotifyAll();
  }
  void End(const absl::Status& status) override {
    MutexLock lock(mutex_);
    EXPECT_FALSE(ended_.has_value()) << "ended twice";
    ended_ = status;
    changed_.NotifyAll();
  }

  void Push(const std::string& message) {
    MutexLock lock(mutex_);
    messages_.push_back(message);
  }
  void SetEnd(const absl::Status& status) {
    MutexLock lock(mutex_);
    end_ = status;
  }
  void AwaitSent(size_t count) {
    MutexLock lock(mutex_);
    while (sent_.size() < count) changed_.Wait(mutex_);
  }
  absl::Status AwaitEnd() {
    MutexLock lock(mutex_);
    while (!ended_.has_value()) changed_.Wait(mutex_);
    return *ended_;
  }
  std::vector<std::string> sent() const {
    MutexLock lock(mutex_);
    return sent_;
  }
  std::thread::id next_thread() const {
    MutexLock lock(mutex_);
    return next_thread_;
  }

 private:
  mutable Mutex mutex_;
  CondVar changed_;
  std::atomic<bool> in_next_ = false;
  std::thread::id next_thread_;
  std::vector<std::string> messages_;
  std::vector<std::string> sent_;
  std::optional<absl::Status> end_;
  std::optional<absl::Status> ended_;
};

TEST(TaskPoolSpec, RunsEverythingThatWasPostedBeforeItStops) {
  std::atomic<int> runs = 0;
  {
    TaskPool pool(3);
    for (int i = 0; i < 1000; ++i) pool.Post([&] { ++runs; });
  }
  EXPECT_EQ(runs, 1000);
}

class WriteLoopSpec : public testing::Test {
 protected:
  // The pool stops before the stream is gone.
  FakeStream stream_;
  TaskPool movers_{2};
  WriteLoop loop_{stream_, movers_};
};

TEST_F(WriteLoopSpec, MakesTheNextMessageOnlyWhenTheOneBeforeIsGone) {
  stream_.Push("a");
  stream_.Push("b");
  stream_.SetEnd(absl::OkStatus());
  loop_.Wake();
  stream_.AwaitSent(1);
  EXPECT_EQ(loop_.ticks(), 1u);
  loop_.Wake();  // changes nothing: a write is in flight
  EXPECT_EQ(stream_.sent(), (std::vector<std::string>{"a"}));
  loop_.OnWriteDone(true);
  EXPECT_EQ(stream_.sent(), (std::vector<std::string>{"a", "b"}));
  loop_.OnWriteDone(true);
  EXPECT_TRUE(stream_.AwaitEnd().ok());
  EXPECT_EQ(loop_.ticks(), 4u);
}

TEST_F(WriteLoopSpec, NeverRunsOnTheThreadThatWakesIt) {
  stream_.Push("a");
  loop_.Wake();
  stream_.AwaitSent(1);
  EXPECT_NE(stream_.next_thread(), std::this_thread::get_id());
  stream_.SetEnd(absl::OkStatus());
  loop_.OnWriteDone(true);
}

TEST_F(WriteLoopSpec, AWakeDuringAWriteIsNotLost) {
  stream_.Push("a");
  loop_.Wake();
  stream_.AwaitSent(1);
  stream_.Push("b");
  loop_.Wake();
  loop_.OnWriteDone(true);
  stream_.AwaitSent(2);
  stream_.SetEnd(absl::OkStatus());
  loop_.OnWriteDone(true);
  EXPECT_TRUE(stream_.AwaitEnd().ok());
}

TEST_F(WriteLoopSpec, AWakeWhileWaitingGoesOn) {
  loop_.Wake();
  stream_.Push("a");
  loop_.Wake();
  stream_.AwaitSent(1);
  stream_.SetEnd(absl::AbortedError("over"));
  loop_.OnWriteDone(true);
  EXPECT_EQ(stream_.AwaitEnd(), absl::AbortedError("over"));
}

TEST_F(WriteLoopSpec, ABrokenWriteEndsTheCall) {
  stream_.Push("a");
  stream_.Push("never sent");
  loop_.Wake();
  stream_.AwaitSent(1);
  loop_.OnWriteDone(false);
  EXPECT_EQ(stream_.AwaitEnd(), absl::CancelledError("broken"));
  EXPECT_EQ(stream_.sent().size(), 1u);
}

TEST_F(WriteLoopSpec, WakesFromManyThreadsLoseNothing) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 250; ++i) {
        stream_.Push("m");
        loop_.Wake();
      }
    });
  }
  for (size_t sent = 1; sent <= 1000; ++sent) {
    stream_.AwaitSent(sent);
    if (sent == 1000) {
      for (std::thread& thread : threads) thread.join();
      stream_.SetEnd(absl::OkStatus());
    }
    loop_.OnWriteDone(true);
  }
  EXPECT_TRUE(stream_.AwaitEnd().ok());
}

class CallGuardSpec : public WriteLoopSpec {
 protected:
  void Advance(absl::Duration duration) {
    clock_.Advance(duration);
    timers_.RunDue();
  }

  ManualClock clock_;
  TimerQueue timers_{clock_};
  std::vector<absl::Status> cuts_;
  CallGuard guard_{timers_, clock_,
                   [this](absl::Status reason) { cuts_.push_back(std::move(reason)); }};
};

TEST_F(CallGuardSpec, CutsWhenALimitPasses) {
  guard_.Limit(absl::Seconds(10), "too slow");
  Advance(absl::Seconds(9));
  EXPECT_TRUE(cuts_.empty());
  Advance(absl::Seconds(1));
  ASSERT_EQ(cuts_.size(), 1u);
  EXPECT_EQ(cuts_[0], absl::DeadlineExceededError("too slow"));
}

TEST_F(CallGuardSpec, DoesNotCutWhatIsMetInTime) {
  guard_.Limit(absl::Seconds(10), "too slow");
  guard_.Met();
  Advance(absl::Seconds(100));
  EXPECT_TRUE(cuts_.empty());
}

TEST_F(CallGuardSpec, CutsAWriteThatStaysInFlight) {
  guard_.WatchWrites(loop_, absl::Seconds(60));
  stream_.Push("a");
  loop_.Wake();
  stream_.AwaitSent(1);
  Advance(absl::Seconds(60));  // seen in flight for the first time
  EXPECT_TRUE(cuts_.empty());
  Advance(absl::Seconds(60));
  ASSERT_EQ(cuts_.size(), 1u);
  EXPECT_EQ(cuts_[0],
            absl::CancelledError(
                "the reader took nothing for write_stall_seconds_max 60 seconds"));
  Advance(absl::Seconds(600));
  EXPECT_EQ(cuts_.size(), 1u);
  stream_.SetEnd(absl::OkStatus());
  loop_.OnWriteDone(false);
}

TEST_F(CallGuardSpec, DoesNotCutAReaderThatTakesSomething) {
  guard_.WatchWrites(loop_, absl::Seconds(60));
  stream_.Push("a");
  loop_.Wake();
  stream_.AwaitSent(1);
  for (size_t i = 1; i <= 10; ++i) {
    Advance(absl::Seconds(60));
    stream_.Push("next");
    loop_.OnWriteDone(true);
    stream_.AwaitSent(i + 1);
  }
  EXPECT_TRUE(cuts_.empty());
  stream_.SetEnd(absl::OkStatus());
  loop_.OnWriteDone(true);
}

TEST_F(CallGuardSpec, DoesNotCutACallThatWritesNothing) {
  guard_.WatchWrites(loop_, absl::Seconds(60));
  Advance(absl::Seconds(6000));
  EXPECT_TRUE(cuts_.empty());
}

TEST_F(CallGuardSpec, IsSilentOnceDisarmed) {
  guard_.Limit(absl::Seconds(10), "too slow");
  guard_.WatchWrites(loop_, absl::Seconds(10));
  guard_.Disarm();
  Advance(absl::Seconds(100));
  EXPECT_TRUE(cuts_.empty());
  EXPECT_EQ(timers_.NextTime(), absl::InfiniteFuture());
}

}  // namespace
}  // namespace pbs::server
