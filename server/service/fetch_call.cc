#include "server/service/fetch_call.h"

#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/messages.h"
#include "server/base/status.h"
#include "server/service/wire_status.h"

namespace pbs::server {
namespace {

// One chunk that gRPC sends and one that is being made.
constexpr int64_t kBuffersPerCall = 2;

}  // namespace

FetchCall::FetchCall(ServiceContext& service, grpc::CallbackServerContext& context,
                     const grpc::ByteBuffer& request)
    : StreamCall(service, context, Rpc::kFetch), transfer_(service) {
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
  PBS_ABSL_ASSIGN_OR_RETURN(lease_, service_.parts.leases.Find(request.ticket()));
  if (request.queries() && lease_.kv->queries().layers().empty()) {
    return absl::InvalidArgumentError(
        "queries true: the prefill of this ticket had no capture_query_layers");
  }
  const KvContent content =
      request.queries() ? KvContent::kQueries : KvContent::kKeysAndValues;
  const KvShape shape = ShapeOf(*lease_.kv, content);
  PBS_ABSL_ASSIGN_OR_RETURN(const KvRange range, DecodeKvRange(request, shape));
  PBS_ABSL_ASSIGN_OR_RETURN(
      const KvFormat format,
      DecodeKvFormat(request, service_.options.transport.chunk_bytes));
  PBS_ABSL_ASSIGN_OR_RETURN(
      exporter_, KvExporter::Create(lease_.kv, service_.parts.leases.epoch(), range,
                                    format, content));
  PBS_ABSL_ASSIGN_OR_RETURN(
      buffers_, service_.Reserve(kBuffersPerCall * KvExporter::BufferBytes(
                                                       shape, range, format, content)));
  return absl::OkStatus();
}

absl::Status FetchCall::CheckSource() const {
  const LeaseEnd end = lease_.end->load();
  if (end == LeaseEnd::kGone) return LeaseStore::NotFound();
  const absl::Status prefill = lease_.kv->status();
  if (end == LeaseEnd::kNone && prefill.ok()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the prefill of this ticket ended early: ",
                                             absl::StatusCodeToString(prefill.code())));
}

bool FetchCall::LetGo() {
  uint64_t waiter;
  {
    MutexLock lock(mutex_);
    if (!waiting_) return true;
    waiter = waiter_;
  }
  // Takes the callback back, or lets it run first.
  if (!lease_.kv->CancelWait(waiter)) return false;
  MutexLock lock(mutex_);
  waiting_ = false;
  return true;
}

NextWrite FetchCall::NextMessage() {
  {
    MutexLock lock(mutex_);
    if (waiting_) return NextWrite::Wait();
  }
  if (absl::Status source = CheckSource(); !source.ok()) return NextWrite::End(source);
  if (exporter_->done()) return NextWrite::End(absl::OkStatus());
  if (exporter_->layer() >= lease_.kv->layers_ready()) {
    AwaitLayer();
    return NextWrite::Wait();
  }
  const wire::KvChunk chunk = exporter_->Next();
  transfer_.AddChunk(chunk.payload.size());
  return NextWrite::Message(wire::EncodeKvChunk(chunk));
}

void FetchCall::AwaitLayer() {
  {
    MutexLock lock(mutex_);
    waiting_ = true;
    waiter_ = 0;
  }
  // May call back before it returns.
  const uint64_t waiter = lease_.kv->WhenReady(exporter_->layer(), [this] {
    MutexLock lock(mutex_);
    waiting_ = false;
    loop_.Wake();
  });
  MutexLock lock(mutex_);
  waiter_ = waiter;
}

void FetchCall::Release(const absl::Status& status) {
  if (status.ok()) {
    transfer_.Complete();
    service_.parts.leases.MarkExported(lease_.ticket, exporter_->held_bytes());
  } else {
    transfer_.Fail(status);
  }
  exporter_.reset();
  lease_ = {};
  buffers_.Reset();
}

}  // namespace pbs::server
