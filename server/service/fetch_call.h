// KvSource.Fetch: streams a held cache, whose prefill may still run.
//
// gRPC owns the call; it deletes itself in OnDone(), which runs only after Finish().
// Finish() waits for a callback of the cache that may be running.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include <grpcpp/grpcpp.h>

#include "server/base/mutex.h"
#include "server/engine/held_kv.h"
#include "server/service/call_guard.h"
#include "server/service/call_record.h"
#include "server/service/service_context.h"
#include "server/service/transfer_record.h"
#include "server/service/write_loop.h"
#include "server/transfer/kv_exporter.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

class FetchCall final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                        private WriteLoop::Stream {
 public:
  FetchCall(ServiceContext& service, grpc::CallbackServerContext& context,
            const grpc::ByteBuffer& request);

  void OnWriteDone(bool ok) override { loop_.OnWriteDone(ok); }
  void OnCancel() override { Fail(service_.WhyCut(deadline_)); }
  void OnDone() override { delete this; }

 private:
  absl::Status Open(const grpc::ByteBuffer& request);
  void Fail(absl::Status status);
  // Registers a callback for when the exporter's layer is ready.
  void AwaitLayer();
  // OK while chunks may be sent.
  absl::Status CheckSource() const;

  NextWrite Next() override;
  void OnBroken() override { Fail(service_.WhyCut(deadline_)); }
  void Send(const grpc::ByteBuffer* message) override { StartWrite(message); }
  void End(const absl::Status& status) override;

  ServiceContext& service_;
  const OpenCalls::Call open_{service_.open_calls};
  grpc::CallbackServerContext& context_;
  const CallDeadline deadline_;
  CallRecord record_;
  TransferRecord transfer_;
  WriteLoop loop_;
  LeaseView lease_;
  ByteReservation buffers_;
  std::unique_ptr<KvExporter> exporter_;

  Mutex mutex_;
  std::optional<absl::Status> failure_ ABSL_GUARDED_BY(mutex_);
  bool waiting_ ABSL_GUARDED_BY(mutex_) = false;  // the cache holds our callback
  uint64_t waiter_ ABSL_GUARDED_BY(mutex_) = 0;

  CallGuard guard_;  // last: its timers use all members above
};

}  // namespace pbs::server
