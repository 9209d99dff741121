// PushStream: one push of a held cache. It is the client of KvSink.Receive at the
// target, and takes its chunks from a KvStream.
//
//   Start() -> header -> chunks, as the cache gets ready and the sink grants credit
//     -> half-close -> the sink ends the call -> PushListener::OnPushEnd()
//
// The push fails when the target takes no call within kPushConnectMax, when the sink
// does nothing that it must do for transport.write_stall_seconds_max (at the latest
// after twice this time), when it acknowledges what cannot be true, or when it ends the
// call before it has confirmed every byte.
//
// Threading: Start() and Close() by the owner; Cancel() from any thread that keeps this
// alive meanwhile. No thread waits: gRPC's callbacks and the movers do the work.
// Memory: as KvStream, two chunks that the owner has charged.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/client_callback.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "proto/wire/messages.h"
#include "server/base/mutex.h"
#include "server/codec/push_header.h"
#include "server/service/call_guard.h"
#include "server/service/kv_stream.h"
#include "server/service/push_credit.h"
#include "server/service/service_context.h"
#include "server/service/write_loop.h"

namespace pbs::server {

class PushListener {
 public:
  virtual ~PushListener() = default;
  // Once after Start(), as its last action: nothing refers to the push any more, and
  // the listener may destroy it. OK: the sink has the whole cache. Else the message
  // names the target and the reason; the code is DataLoss, FailedPrecondition or
  // ResourceExhausted when the sink said so or broke a rule, Cancelled when the owner
  // or its prefill failed first, and Unavailable else.
  virtual void OnPushEnd(const absl::Status& status) = 0;
};

// What is pushed, and where.
struct PushContent {
  std::string target;  // one of PushTargets
  PushFacts facts;     // without transfer_id and bytes
  KvFormat format;
  std::shared_ptr<HeldKv> kv;
  std::unique_ptr<KvExporter> exporter;  // of `kv`
  ByteReservation buffers;               // KvStream::BufferBytes()
};

class PushStream final
    : private grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
      private WriteLoop::Stream {
 public:
  PushStream(ServiceContext& service, PushListener& listener, PushContent content);
  ~PushStream() override = default;

  // Begins the call; once. OnPushEnd() may come before it returns.
  void Start();
  // Ends the call as soon as possible.
  void Cancel();
  // Records how the owner's call ended, and frees everything. Not between Start() and
  // OnPushEnd().
  void Close(const absl::Status& status);

  // After OnPushEnd() with OK: seconds from the first chunk until the sink had all.
  double send_seconds() const { return send_seconds_; }

 private:
  // What the next progress depends on.
  enum class Waits : uint8_t { kNothing, kWrite, kCredit, kEnd };

  // grpc::ClientBidiReactor.
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;
  // WriteLoop::Stream.
  NextWrite Next() override;
  void OnBroken() override;
  void Send(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void End(const absl::Status& status) override;

  NextWrite NextChunk();
  absl::Status TakeAck();
  // The first reason counts.
  void Fail(const absl::Status& reason);
  void WakeLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The reason of a cut by the guard.
  absl::Status WhyCut(const absl::Status& cut) const;
  absl::Status Outcome(const grpc::Status& status) const;
  absl::Status Failed(absl::StatusCode code, absl::string_view why) const;
  // As WriteLoop::ticks(): odd while the sink must do something.
  uint64_t ticks() const { return 2 * progress_ + (waits_ != Waits::kNothing ? 1 : 0); }

  ServiceContext& service_;
  PushListener& listener_;
  const std::string target_;
  KvStream stream_;
  grpc::ByteBuffer header_;             // empty once it was passed on
  std::optional<wire::KvChunk> chunk_;  // made, and waits for credit
  double send_seconds_ = 0;
  grpc::ClientContext context_;
  grpc::ByteBuffer ack_;  // of the read under way

  std::atomic<uint64_t> progress_{0};  // what the sink did
  std::atomic<Waits> waits_{Waits::kNothing};

  mutable Mutex mutex_;
  PushCredit credit_ ABSL_GUARDED_BY(mutex_);
  uint64_t wanted_ ABSL_GUARDED_BY(mutex_) = 0;  // credit that chunk_ needs
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool header_sent_ ABSL_GUARDED_BY(mutex_) = false;
  bool sink_ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(mutex_);
  bool complete_ = false;  // set before OnPushEnd()

  WriteLoop loop_;
  CallGuard guard_;
};

}  // namespace pbs::server
