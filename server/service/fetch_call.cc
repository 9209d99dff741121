#include "server/service/fetch_call.h"

#include <memory>
#include <optional>
#include <utility>

#include "proto/wire/messages.h"
#include "server/base/status.h"
#include "server/codec/wire_status.h"
#include "server/transfer/kv_exporter.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {
namespace {

absl::Status NoSharedMemory() {
  return absl::FailedPreconditionError(
      "shared_memory true: this server holds its caches in private memory; its setting "
      "shared_memory_socket is empty");
}

}  // namespace

FetchCall::FetchCall(ServiceContext& service, grpc::CallbackServerContext& context,
                     const grpc::ByteBuffer& request)
    : StreamCall(service, context, Rpc::kFetch),
      stream_(service, [this] { loop_.Wake(); }) {
  Start();
  if (absl::Status status = Open(context, request); !status.ok()) {
    Fail(status);
    return;
  }
  // The first chunk may be a long time away: tell the caller that he was let in.
  StartSendInitialMetadata();
  loop_.Wake();
}

absl::Status FetchCall::Open(const grpc::CallbackServerContext& context,
                             const grpc::ByteBuffer& buffer) {
  PBS_ABSL_RETURN_IF_ERROR(service_.CheckReady(context));
  v1::FetchRequest request;
  PBS_ABSL_RETURN_IF_ERROR(FromWire(wire::DecodeMessage(buffer, &request)));
  PBS_ABSL_ASSIGN_OR_RETURN(const LeaseView lease,
                            service_.parts.leases.Find(request.ticket()));
  if (request.queries() && lease.kv->queries().layers().empty()) {
    return absl::InvalidArgumentError(
        "queries true: the prefill of this ticket had no capture_query_layers");
  }
  const KvContent content =
      request.queries() ? KvContent::kQueries : KvContent::kKeysAndValues;
  const KvShape shape = ShapeOf(*lease.kv, content);
  PBS_ABSL_ASSIGN_OR_RETURN(const KvRange range, DecodeKvRange(request, shape));
  PBS_ABSL_ASSIGN_OR_RETURN(
      const KvFormat format,
      DecodeKvFormat(request, service_.options.transport.chunk_bytes));
  PBS_ABSL_ASSIGN_OR_RETURN(const std::optional<KvPlace> resume,
                            DecodeKvPlace(request, range));
  if (format.shared_memory) {
    PBS_ABSL_RETURN_IF_ERROR(CheckSharedMemory(request, shape.dtype));
    if (lease.kv->region() == nullptr) return NoSharedMemory();
  }
  PBS_ABSL_ASSIGN_OR_RETURN(std::unique_ptr<KvExporter> exporter,
                            KvExporter::Create(lease.kv, service_.parts.leases.epoch(),
                                               range, format, content, resume));
  PBS_ABSL_ASSIGN_OR_RETURN(
      ByteReservation buffers,
      service_.Reserve(KvStream::BufferBytes(shape, range, format, content)));
  ticket_ = lease.ticket;
  stream_.Open(lease.kv, std::move(exporter), std::move(buffers));
  return absl::OkStatus();
}

NextWrite FetchCall::NextMessage() {
  if (stream_.done()) return NextWrite::End(absl::OkStatus());
  auto chunk = stream_.Next();
  if (!chunk.ok()) return NextWrite::End(std::move(chunk).status());
  if (!chunk->has_value()) return NextWrite::Wait();
  return NextWrite::Message(wire::EncodeKvChunk(**chunk));
}

void FetchCall::Release(const absl::Status& status) {
  if (status.ok()) {
    stream_.Complete();
    service_.parts.leases.MarkExported(ticket_, stream_.held_bytes());
  } else {
    stream_.Fail(status);
  }
  stream_.Close();
}

}  // namespace pbs::server
