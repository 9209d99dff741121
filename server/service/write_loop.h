// Sends a stream's messages one after the other and makes each when the one before it
// was sent. So a call holds one message at a time, also when its reader is slow.
//
//   Wake() -> Next() -> Send() ... OnWriteDone() -> Next() -> ... -> End()
//
// Next() runs on a mover thread after Wake() and on gRPC's thread after a write. It
// never runs twice at once. It never runs on the thread that called Wake(), because
// that may be the executor's.
//
// Threading: Wake() and the counters are safe from any thread; OnWriteDone() belongs to
// gRPC. Memory: the message in flight.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>

#include <grpcpp/support/byte_buffer.h>

#include "absl/status/status.h"
#include "server/base/mutex.h"
#include "server/service/task_pool.h"

namespace pbs::server {

// The next action of a stream.
class NextWrite {
 public:
  static NextWrite Message(grpc::ByteBuffer message) {
    return NextWrite(Kind::kMessage, std::move(message), absl::OkStatus());
  }
  // Waits for the next Wake().
  static NextWrite Wait() { return NextWrite(Kind::kWait, {}, absl::OkStatus()); }
  // Ends the call with `status`.
  static NextWrite End(absl::Status status) {
    return NextWrite(Kind::kEnd, {}, std::move(status));
  }

 private:
  friend class WriteLoop;
  enum class Kind : uint8_t { kMessage, kWait, kEnd };
  NextWrite(Kind kind, grpc::ByteBuffer message, absl::Status status)
      : kind_(kind), message_(std::move(message)), status_(std::move(status)) {}

  Kind kind_;
  grpc::ByteBuffer message_;
  absl::Status status_;
};

class WriteLoop {
 public:
  class Stream {
   public:
    virtual ~Stream() = default;
    virtual NextWrite Next() = 0;
    // Called when the last write failed, so that the call is broken. Next() follows and
    // must eventually return End().
    virtual void OnBroken() = 0;
    // Calls StartWrite(). `message` lives until OnWriteDone().
    virtual void Send(const grpc::ByteBuffer* message) = 0;
    // Calls Finish(), once. The stream and the loop may be destroyed when it returns.
    virtual void End(const absl::Status& status) = 0;
  };

  // Both must outlive the loop.
  WriteLoop(Stream& stream, TaskPool& movers) : stream_(stream), movers_(movers) {}

  // Call it when the result of Next() may have changed. No-op after End().
  void Wake();
  void OnWriteDone(bool ok);

  // Odd while a write is in flight; each write counts two.
  uint64_t ticks() const { return ticks_.load(std::memory_order_relaxed); }

 private:
  void Run();

  Stream& stream_;
  TaskPool& movers_;
  std::atomic<uint64_t> ticks_{0};
  Mutex mutex_;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;  // Run() or a write is under way
  // Wake() was called since Run() last called Next()
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ByteBuffer message_;  // of the write in flight
};

}  // namespace pbs::server
