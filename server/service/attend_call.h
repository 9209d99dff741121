// Attention.Attend: one bidirectional call.
//
//   slot -> header -> checks, reservation, memory -> chunks -> half-close
//     -> Submit -> reply
//
// Submit runs on gRPC's thread, or on the background thread when a generator or a check
// of order or lists must run first. The call holds its slot until Submit is done.
//
// gRPC owns the call; it deletes itself in OnDone(), which runs only after Finish().
// Finish() waits until Submit and the engine's job no longer refer to the call.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include <grpcpp/grpcpp.h>

#include "server/base/mutex.h"
#include "server/engine/engine.h"
#include "server/service/attend_reply.h"
#include "server/service/attend_upload.h"
#include "server/service/call_guard.h"
#include "server/service/call_record.h"
#include "server/service/service_context.h"
#include "server/service/write_loop.h"

namespace pbs::server {

class AttendCall final
    : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
      private AttendListener,
      private WriteLoop::Stream {
 public:
  AttendCall(ServiceContext& service, grpc::CallbackServerContext& context);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override { loop_.OnWriteDone(ok); }
  void OnCancel() override { Fail(service_.WhyCut(deadline_)); }
  void OnDone() override { delete this; }

 private:
  // Reads the upload; on gRPC's reading thread only.
  absl::Status Read();
  absl::Status TakeHeader(const v1::AttendHeader& header);
  absl::Status EndUpload();
  void Submit();
  std::unique_ptr<AttendUpload> TakeUpload();
  absl::Status StoreJob(JobId id);

  // Ends the call with `status` as soon as nothing refers to it. Only the first call of
  // Fail() has an effect.
  void Fail(const absl::Status& status);
  // AttendListener.
  void OnDone(absl::StatusOr<AttendResult> result) override;
  // WriteLoop::Stream.
  NextWrite Next() override;
  void OnBroken() override { Fail(service_.WhyCut(deadline_)); }
  void Send(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void End(const absl::Status& status) override;

  ServiceContext& service_;
  const OpenCalls::Call open_{service_.open_calls};
  grpc::CallbackServerContext& context_;
  const CallDeadline deadline_;
  CallRecord record_;
  WriteLoop loop_;
  grpc::ByteBuffer read_;
  // Used by the reading thread; after the half-close by TakeUpload() and, while
  // queued_, by Fail(), under the mutex.
  std::unique_ptr<AttendUpload> upload_;
  JobTerms terms_;
  std::atomic<bool> stop_{false};  // stops MakeJob()

  Mutex mutex_;
  int references_ ABSL_GUARDED_BY(mutex_) = 0;   // from Submit() and the engine's job
  bool queued_ ABSL_GUARDED_BY(mutex_) = false;  // for the background thread
  JobId job_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(mutex_);
  std::optional<AttendResult> result_ ABSL_GUARDED_BY(mutex_);

  std::optional<AttendSpec> spec_;      // set by the header
  std::unique_ptr<AttendReply> reply_;  // used by Next() only
  // Last members: a drain and timers end the call through them and use all members
  // above.
  Uploads::Slot slot_;
  CallGuard guard_;
};

}  // namespace pbs::server
