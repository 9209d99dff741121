// Attention.Attend: one bidirectional call.
//
//   header -> checks, slot, reservation, memory -> chunks -> half-close
//     -> (background) generator, order and list checks -> Submit -> reply
//
// gRPC owns the call; it deletes itself in OnDone(), which runs only after Finish().
// Finish() waits for what still refers to the call: the background task and the
// engine's job.
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
  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  // The upload: gRPC's reading thread only.
  absl::Status Read();
  absl::Status TakeHeader(const v1::AttendHeader& header);
  absl::Status EndUpload();
  // On the background thread.
  void Submit();
  bool StoreJob(JobId id);

  // Ends the call with `status` as soon as nothing refers to it; the first one counts.
  void Fail(absl::Status status);
  // AttendListener.
  void OnDone(absl::StatusOr<AttendResult> result) override;
  // WriteLoop::Stream.
  NextWrite Next() override;
  void OnBroken() override { Fail(absl::CancelledError("the caller went away")); }
  void Send(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void End(const absl::Status& status) override;

  ServiceContext& service_;
  const OpenCalls::Call open_{service_.open_calls};
  grpc::CallbackServerContext& context_;
  CallRecord record_;
  WriteLoop loop_;
  grpc::ByteBuffer read_;
  UploadSlot slot_;
  std::unique_ptr<AttendUpload> upload_;
  JobTerms terms_;
  std::atomic<bool> stop_{false};  // for the background task

  Mutex mutex_;
  int references_ ABSL_GUARDED_BY(mutex_) = 0;  // background task, engine's job
  JobId job_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(mutex_);
  std::optional<AttendResult> result_ ABSL_GUARDED_BY(mutex_);

  std::optional<AttendSpec> spec_;      // from the header on
  std::unique_ptr<AttendReply> reply_;  // Next() only
  CallGuard guard_;                     // last: its timers look at everything above
};

}  // namespace pbs::server
