// Prefill.Prefill: takes tokens and streams events and, with inline delivery, the
// cache.
//
//   checks -> lease -> reservation -> Submit -> admitted
//     -> (layer events, inline chunks as layers get ready) -> done
//
// gRPC owns the call; it deletes itself in OnDone(), which runs only after Finish().
// Finish() waits for the engine's job.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>

#include <grpcpp/grpcpp.h>

#include "server/base/mutex.h"
#include "server/engine/engine.h"
#include "server/service/call_guard.h"
#include "server/service/call_record.h"
#include "server/service/prefill_reply.h"
#include "server/service/prefill_request.h"
#include "server/service/service_context.h"
#include "server/service/transfer_record.h"
#include "server/service/write_loop.h"
#include "server/transfer/kv_exporter.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

class PrefillCall final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                          private PrefillListener,
                          private WriteLoop::Stream {
 public:
  PrefillCall(ServiceContext& service, grpc::CallbackServerContext& context,
              const grpc::ByteBuffer& request);

  void OnWriteDone(bool ok) override { loop_.OnWriteDone(ok); }
  void OnCancel() override { Fail(service_.WhyCut(deadline_)); }
  void OnDone() override { delete this; }

 private:
  // Called on gRPC's thread, before the call's first message.
  absl::Status Open(const grpc::ByteBuffer& request);
  absl::Status Decode(const v1::PrefillRequest& request);
  absl::StatusOr<bool> BeginLease();
  absl::StatusOr<PrefillReservation> Reserve();
  absl::Status Submit();
  absl::Status Admit(const Admission& admission);
  absl::Status ReplyWithExisting(const LeaseView& lease);
  int64_t ResultBytes() const;

  void Fail(const absl::Status& status);
  void PushEvent(grpc::ByteBuffer event);

  // PrefillListener, called on the executor's thread.
  void OnKvReady(int32_t layer) override;
  void OnLayerDone(int32_t layer, double density, double seconds) override;
  void OnDone(absl::StatusOr<PrefillResult> result) override;

  // WriteLoop::Stream.
  NextWrite Next() override;
  void OnBroken() override { Fail(service_.WhyCut(deadline_)); }
  void Send(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void End(const absl::Status& status) override;
  std::optional<grpc::ByteBuffer> NextChunk();
  NextWrite FinishResult(PrefillResult result);

  ServiceContext& service_;
  const OpenCalls::Call open_{service_.open_calls};
  grpc::CallbackServerContext& context_;
  const CallDeadline deadline_;
  CallRecord record_;
  TransferRecord transfer_;
  WriteLoop loop_;

  const ServedModel* model_ = nullptr;
  PrefillSpec spec_;
  PrefillFacts facts_;
  PendingLease lease_;
  ByteReservation result_bytes_;
  ByteReservation buffers_;
  std::shared_ptr<HeldKv> kv_;  // shared with job, lease and chunks being sent
  std::unique_ptr<KvExporter> exporter_;

  Mutex mutex_;
  bool job_runs_ ABSL_GUARDED_BY(mutex_) = false;
  bool admitted_ ABSL_GUARDED_BY(mutex_) = false;  // nothing is sent before it is true
  JobId job_ ABSL_GUARDED_BY(mutex_) = 0;
  // At most one event per layer, `admitted` and `done`.
  std::deque<grpc::ByteBuffer> events_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(mutex_);
  std::optional<PrefillResult> result_ ABSL_GUARDED_BY(mutex_);
  // Ends with OK once the events are sent
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;

  CallGuard guard_;  // last: its timers use all members above
};

}  // namespace pbs::server
