// KvSource.Fetch: streams a held cache, whose prefill may still run.
#pragma once

#include <grpcpp/grpcpp.h>

#include "server/service/kv_stream.h"
#include "server/service/service_context.h"
#include "server/service/stream_call.h"

namespace pbs::server {

class FetchCall final : public StreamCall<grpc::ServerWriteReactor<grpc::ByteBuffer>> {
 public:
  FetchCall(ServiceContext& service, grpc::CallbackServerContext& context,
            const grpc::ByteBuffer& request);

 private:
  absl::Status Open(const grpc::CallbackServerContext& context,
                    const grpc::ByteBuffer& request);

  // StreamCall.
  NextWrite NextMessage() override;
  bool LetGo() override { return stream_.LetGo(); }
  void Release(const absl::Status& status) override;

  v1::KvTicket ticket_;
  KvStream stream_;
};

}  // namespace pbs::server
