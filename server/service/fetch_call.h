// KvSource.Fetch: streams a held cache, whose prefill may still run.
//
// Finish() waits for a callback of the cache that may be running.
#pragma once

#include <cstdint>
#include <memory>

#include <grpcpp/grpcpp.h>

#include "server/engine/held_kv.h"
#include "server/service/service_context.h"
#include "server/service/stream_call.h"
#include "server/service/transfer_record.h"
#include "server/transfer/kv_exporter.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

class FetchCall final : public StreamCall<grpc::ServerWriteReactor<grpc::ByteBuffer>> {
 public:
  FetchCall(ServiceContext& service, grpc::CallbackServerContext& context,
            const grpc::ByteBuffer& request);

 private:
  absl::Status Open(const grpc::CallbackServerContext& context,
                    const grpc::ByteBuffer& request);
  // Registers a callback for when the exporter's layer is ready.
  void AwaitLayer();
  // OK while chunks may be sent.
  absl::Status CheckSource() const;

  // StreamCall.
  NextWrite NextMessage() override;
  bool LetGo() override;
  void Release(const absl::Status& status) override;

  TransferRecord transfer_;
  LeaseView lease_;
  ByteReservation buffers_;
  std::unique_ptr<KvExporter> exporter_;

  bool waiting_ ABSL_GUARDED_BY(mutex_) = false;  // the cache holds our callback
  uint64_t waiter_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pbs::server
