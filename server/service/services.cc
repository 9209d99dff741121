#include "server/service/services.h"

#include <cstdint>
#include <optional>
#include <utility>

#include "proto/wire/messages.h"
#include "server/base/status.h"
#include "server/codec/wire_status.h"
#include "server/service/attend_call.h"
#include "server/service/call_record.h"
#include "server/service/fetch_call.h"
#include "server/service/info.h"
#include "server/service/prefill_call.h"

namespace pbs::server {
namespace {

// Decodes, calls `handle(request)` -> StatusOr<message>, encodes.
template <class Request, class Handle>
absl::Status Answer(const ServiceContext& service,
                    const grpc::CallbackServerContext& context,
                    const grpc::ByteBuffer& buffer, grpc::ByteBuffer* response,
                    const Handle& handle) {
  PBS_ABSL_RETURN_IF_ERROR(service.CheckReady(context));
  Request request;
  PBS_ABSL_RETURN_IF_ERROR(FromWire(wire::DecodeMessage(buffer, &request)));
  PBS_ABSL_ASSIGN_OR_RETURN(const auto answer, handle(request));
  *response = wire::EncodeMessage(answer);
  return absl::OkStatus();
}

// A call with one reply, open until that is on its way: what it does may be what a
// shutdown waits for.
class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  explicit UnaryCall(OpenCalls& calls) : open_(calls) {}
  void OnDone() override { delete this; }

 private:
  const OpenCalls::Call open_;
};

template <class Request, class Handle>
grpc::ServerUnaryReactor* Unary(ServiceContext& service, Rpc rpc,
                                const grpc::CallbackServerContext& context,
                                const grpc::ByteBuffer* request,
                                grpc::ByteBuffer* response, const Handle& handle) {
  const CallRecord record(service.parts, rpc);
  auto* const call = new UnaryCall(service.open_calls);
  call->Finish(
      record.End(Answer<Request>(service, context, *request, response, handle)));
  return call;
}

std::optional<int32_t> TtlOf(const v1::RenewRequest& request) {
  if (!request.has_ttl_seconds()) return std::nullopt;
  return request.ttl_seconds();
}

}  // namespace

// ---- Prefill

grpc::ServerWriteReactor<grpc::ByteBuffer>* PrefillService::Prefill(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return new PrefillCall(service_, *context, *request);
}

grpc::ServerUnaryReactor* PrefillService::ListModels(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Unary<v1::ListModelsRequest>(
      service_, Rpc::kListModels, *context, request, response,
      [this](const v1::ListModelsRequest&) -> absl::StatusOr<v1::ListModelsResponse> {
        v1::ListModelsResponse answer;
        for (const ServedModel* model : service_.models()) {
          *answer.add_models() = DescribeModel(*model);
        }
        return answer;
      });
}

grpc::ServerUnaryReactor* PrefillService::GetServerInfo(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Unary<v1::GetServerInfoRequest>(
      service_, Rpc::kGetServerInfo, *context, request, response,
      [this](const v1::GetServerInfoRequest&) -> absl::StatusOr<v1::ServerInfo> {
        return DescribeServer(service_.options, service_.parts.leases,
                              service_.parts.ledger.bytes_max());
      });
}

// ---- Attention

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* AttentionService::Attend(
    grpc::CallbackServerContext* context) {
  return new AttendCall(service_, *context);
}

// ---- KvSource

grpc::ServerUnaryReactor* KvSourceService::Describe(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Unary<v1::KvTicket>(
      service_, Rpc::kDescribe, *context, request, response,
      [this](const v1::KvTicket& ticket) -> absl::StatusOr<v1::KvDescriptor> {
        PBS_ABSL_ASSIGN_OR_RETURN(const LeaseView lease,
                                  service_.parts.leases.Find(ticket));
        return DescribeKv(lease);
      });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* KvSourceService::Fetch(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return new FetchCall(service_, *context, *request);
}

grpc::ServerUnaryReactor* KvSourceService::Renew(grpc::CallbackServerContext* context,
                                                 const grpc::ByteBuffer* request,
                                                 grpc::ByteBuffer* response) {
  return Unary<v1::RenewRequest>(
      service_, Rpc::kRenew, *context, request, response,
      [this](const v1::RenewRequest& renew) -> absl::StatusOr<v1::KvLease> {
        PBS_ABSL_ASSIGN_OR_RETURN(
            const LeaseView lease,
            service_.parts.leases.Renew(renew.ticket(), TtlOf(renew)));
        return DescribeLease(lease);
      });
}

grpc::ServerUnaryReactor* KvSourceService::Release(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request,
                                                   grpc::ByteBuffer* response) {
  return Unary<v1::ReleaseRequest>(
      service_, Rpc::kRelease, *context, request, response,
      [this](const v1::ReleaseRequest& release) -> absl::StatusOr<v1::ReleaseResponse> {
        PBS_ABSL_RETURN_IF_ERROR(service_.parts.leases.Release(release.ticket()));
        return v1::ReleaseResponse();
      });
}

}  // namespace pbs::server
