// The three services of pbs.v1: each method creates its call object. All methods are
// raw, so that tensor bytes are never parsed and malformed messages are handled like
// all other errors.
//
// Threading: gRPC calls methods from its threads. Memory: none.
#pragma once

#include <grpcpp/grpcpp.h>

#include "pbs/v1/attention.grpc.pb.h"
#include "pbs/v1/kv.grpc.pb.h"
#include "pbs/v1/prefill.grpc.pb.h"
#include "server/service/service_context.h"

namespace pbs::server {

class PrefillService final
    : public v1::Prefill::WithRawCallbackMethod_Prefill<
          v1::Prefill::WithRawCallbackMethod_ListModels<
              v1::Prefill::WithRawCallbackMethod_GetServerInfo<v1::Prefill::Service>>> {
 public:
  explicit PrefillService(ServiceContext& service) : service_(service) {}

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Prefill(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;

 private:
  ServiceContext& service_;
};

class AttentionService final
    : public v1::Attention::WithRawCallbackMethod_Attend<v1::Attention::Service> {
 public:
  explicit AttentionService(ServiceContext& service) : service_(service) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attend(
      grpc::CallbackServerContext* context) override;

 private:
  ServiceContext& service_;
};

class KvSourceService final : public v1::KvSource::WithRawCallbackMethod_Describe<
                                  v1::KvSource::WithRawCallbackMethod_Fetch<
                                      v1::KvSource::WithRawCallbackMethod_Renew<
                                          v1::KvSource::WithRawCallbackMethod_Release<
                                              v1::KvSource::Service>>>> {
 public:
  explicit KvSourceService(ServiceContext& service) : service_(service) {}

  grpc::ServerUnaryReactor* Describe(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Fetch(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Renew(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Release(grpc::CallbackServerContext* context,
                                    const grpc::ByteBuffer* request,
                                    grpc::ByteBuffer* response) override;

 private:
  ServiceContext& service_;
};

}  // namespace pbs::server
