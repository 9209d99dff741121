// What the streaming calls have in common: time limits, the first failure, the end.
//
//   constructor -> Start() -> NextMessage() ... -> Release() -> Finish()
//
// `Reactor` is gRPC's reactor of the call. gRPC owns the call; it deletes itself in
// OnDone(), which runs only after Finish(). Finish() waits until LetGo() says that
// nothing else refers to the call.
//
// Threading: Fail() from any thread that keeps the call alive meanwhile. NextMessage(),
// LetGo() and Release() are called one at a time, by the write loop.
#pragma once

#include <optional>

#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/base/mutex.h"
#include "server/service/call_deadline.h"
#include "server/service/call_guard.h"
#include "server/service/call_record.h"
#include "server/service/open_calls.h"
#include "server/service/service_context.h"
#include "server/service/write_loop.h"

namespace pbs::server {

template <typename Reactor>
class StreamCall : public Reactor, private WriteLoop::Stream {
 public:
  void OnWriteDone(bool ok) final { loop_.OnWriteDone(ok); }
  void OnCancel() final { Fail(service_.WhyCut(deadline_)); }
  void OnDone() final { delete this; }

 protected:
  StreamCall(ServiceContext& service, grpc::CallbackServerContext& context, Rpc rpc)
      : service_(service),
        deadline_(service.DeadlineOf(context)),
        record_(service.parts, rpc),
        loop_(*this, service.movers),
        guard_(service.parts.timers, service.parts.clock,
               [this, &context](const absl::Status& reason) {
                 Fail(reason);
                 // A stalled write ends no other way. A time limit ends an upload,
                 // whose caller still reads: he gets the status.
                 if (absl::IsCancelled(reason)) context.TryCancel();
               }) {}
  ~StreamCall() override = default;

  // Watches for stalled writes. Call it first in the constructor's body: the hooks
  // below may be called from then on.
  void Start() {
    guard_.WatchWrites(
        loop_, absl::Seconds(service_.options.transport.write_stall_seconds_max));
  }

  // Ends the call with `status` as soon as nothing else refers to it. The first failure
  // counts.
  void Fail(const absl::Status& status) {
    {
      MutexLock lock(mutex_);
      if (failure_.has_value()) return;
      failure_ = status;
      loop_.Wake();
    }
    OnFailed(status);
  }

  // The next message, a wait, or the end. Not called after a failure.
  virtual NextWrite NextMessage() = 0;
  // After a failure, and again after each Wake(): whether nothing refers to the call
  // but gRPC.
  virtual bool LetGo() = 0;
  // After the first failure, without the lock, on the thread that called Fail().
  virtual void OnFailed(const absl::Status&) {}
  // Frees what the call holds. The caller gets the status after that.
  virtual void Release(const absl::Status& status) = 0;

  ServiceContext& service_;
  const OpenCalls::Call open_{service_.open_calls};
  const CallDeadline deadline_;
  CallRecord record_;
  WriteLoop loop_;
  Mutex mutex_;
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(mutex_);
  CallGuard guard_;

 private:
  NextWrite Next() final {
    std::optional<absl::Status> failure;
    {
      MutexLock lock(mutex_);
      failure = failure_;
    }
    if (!failure.has_value()) return NextMessage();
    return LetGo() ? NextWrite::End(*failure) : NextWrite::Wait();
  }
  void OnBroken() final { OnCancel(); }
  void Send(const grpc::ByteBuffer* message) final { this->StartWrite(message); }
  void End(const absl::Status& status) final {
    guard_.Disarm();
    Release(status);
    this->Finish(record_.End(status));
  }
};

}  // namespace pbs::server
