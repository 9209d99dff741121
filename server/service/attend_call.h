// Attention.Attend: one bidirectional call.
//
//   slot -> header -> checks, reservation, memory -> chunks -> half-close
//     -> Submit -> reply
//
// Submit runs on gRPC's thread, or on the background thread when a generator or a check
// of order or lists must run first. The call holds its slot until Submit is done.
//
// Finish() waits until Submit and the engine's job no longer refer to the call.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include <grpcpp/grpcpp.h>

#include "server/codec/attend_reply.h"
#include "server/engine/engine.h"
#include "server/service/attend_upload.h"
#include "server/service/service_context.h"
#include "server/service/stream_call.h"

namespace pbs::server {

class AttendCall final
    : public StreamCall<grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>>,
      private AttendListener {
 public:
  AttendCall(ServiceContext& service, grpc::CallbackServerContext& context);

  void OnReadDone(bool ok) override;

 private:
  // Reads the upload; on gRPC's reading thread only.
  absl::Status Read();
  absl::Status TakeHeader(const v1::AttendHeader& header);
  absl::Status EndUpload();
  void Submit();
  std::unique_ptr<AttendUpload> TakeUpload();
  absl::Status StoreJob(JobId id);

  using StreamCall::OnDone;  // gRPC's, beside the listener's
  // AttendListener.
  void OnDone(absl::StatusOr<AttendResult> result) override;
  // StreamCall.
  NextWrite NextMessage() override;
  bool LetGo() override;
  void OnFailed(const absl::Status& status) override;
  void Release(const absl::Status& status) override;

  grpc::CallbackServerContext& context_;
  grpc::ByteBuffer read_;
  // Used by the reading thread; after the half-close by TakeUpload() and, while
  // queued_, by OnFailed(), under the mutex.
  std::unique_ptr<AttendUpload> upload_;
  JobTerms terms_;
  std::atomic<bool> stop_{false};  // stops MakeJob()

  int references_ ABSL_GUARDED_BY(mutex_) = 0;   // from Submit() and the engine's job
  bool queued_ ABSL_GUARDED_BY(mutex_) = false;  // for the background thread
  JobId job_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<AttendResult> result_ ABSL_GUARDED_BY(mutex_);

  std::optional<AttendSpec> spec_;      // set by the header
  std::unique_ptr<AttendReply> reply_;  // used by NextMessage() only
  // Last: a drain ends the call through it and uses all members above.
  Uploads::Slot slot_;
};

}  // namespace pbs::server
