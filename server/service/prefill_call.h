// Prefill.Prefill: takes tokens and streams events and, with inline delivery, the
// cache; with delivery by push, it sends the cache to a sink.
//
//   checks -> lease -> reservation -> Submit -> admitted
//     -> (layer events, inline chunks as layers get ready) -> done
//
// Finish() waits for the engine's job.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include <grpcpp/grpcpp.h>

#include "server/codec/prefill_reply.h"
#include "server/codec/prefill_request.h"
#include "server/engine/engine.h"
#include "server/service/kv_stream.h"
#include "server/service/kv_wait.h"
#include "server/service/push_stream.h"
#include "server/service/service_context.h"
#include "server/service/stream_call.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

class PrefillCall final : public StreamCall<grpc::ServerWriteReactor<grpc::ByteBuffer>>,
                          private PrefillListener,
                          private PushListener {
 public:
  PrefillCall(ServiceContext& service, grpc::CallbackServerContext& context,
              const grpc::ByteBuffer& request);

 private:
  // Called on gRPC's thread, before the call's first message.
  absl::Status Open(const grpc::CallbackServerContext& context,
                    const grpc::ByteBuffer& request);
  absl::Status Decode(const v1::PrefillRequest& request);
  // Lowers the threshold where the request allows it and would else miss its deadline.
  void FitDeadline();
  absl::StatusOr<bool> BeginLease();
  absl::StatusOr<PrefillReservation> Reserve();
  absl::Status Submit();
  absl::Status Admit(const Admission& admission);
  absl::Status ReplyWithExisting(const LeaseView& lease);
  int64_t ResultBytes() const;
  // Makes what sends the cache with inline delivery and with push.
  absl::Status OpenDelivery(ByteReservation buffers);
  void StartPush();

  void PushEvent(grpc::ByteBuffer event);

  using StreamCall::OnDone;  // gRPC's, beside the listener's
  // PrefillListener, called on the executor's thread.
  void OnLayerDone(int32_t layer, double density, double seconds) override;
  void OnDone(absl::StatusOr<PrefillResult> result) override;

  // PushListener.
  void OnPushEnd(const absl::Status& status) override;

  // StreamCall.
  NextWrite NextMessage() override;
  bool LetGo() override;
  void OnFailed(const absl::Status& status) override;
  void Release(const absl::Status& status) override;
  // When the prefill has finished or its lease has ended.
  void OnKvEnded();
  NextWrite NextResult();
  NextWrite FinishResult(PrefillResult result);

  KvStream stream_;                   // open with inline delivery
  std::unique_ptr<PushStream> push_;  // with delivery by push
  KvWait lease_end_;                  // with delivery by lease

  const ServedModel* model_ = nullptr;
  PrefillSpec spec_;
  PrefillFacts facts_;
  std::string fingerprint_;  // of what was asked for; empty without an idempotency key
  bool threshold_lowered_ = false;
  PendingLease lease_;
  ByteReservation result_bytes_;
  std::shared_ptr<HeldKv> kv_;  // shared with job, lease and chunks being sent

  bool job_runs_ ABSL_GUARDED_BY(mutex_) = false;
  bool push_runs_ ABSL_GUARDED_BY(mutex_) = false;
  bool pushed_ ABSL_GUARDED_BY(mutex_) = false;    // the sink has the whole cache
  bool admitted_ ABSL_GUARDED_BY(mutex_) = false;  // nothing is sent before it is true
  JobId job_ ABSL_GUARDED_BY(mutex_) = 0;
  // At most one event per layer, `admitted` and `done`.
  std::deque<grpc::ByteBuffer> events_ ABSL_GUARDED_BY(mutex_);
  std::optional<PrefillResult> result_ ABSL_GUARDED_BY(mutex_);
  // Ends with OK once the events are sent
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace pbs::server
