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
    : service_(service),
      context_(context),
      deadline_(service.DeadlineOf(context)),
      record_(service.parts, Rpc::kFetch),
      transfer_(service),
      loop_(*this, service.movers),
      guard_(service.parts.timers, service.parts.clock, [this](absl::Status reason) {
        Fail(std::move(reason));
        context_.TryCancel();
      }) {
  guard_.WatchWrites(loop_,
                     absl::Seconds(service.options.transport.write_stall_seconds_max));
  if (absl::Status status = Open(request); !status.ok()) {
    Fail(std::move(status));
    return;
  }
  // The first chunk may be a long time away: tell the caller that he was let in.
  StartSendInitialMetadata();
  loop_.Wake();
}

absl::Status FetchCall::Open(const grpc::ByteBuffer& buffer) {
  PBS_ABSL_RETURN_IF_ERROR(service_.CheckReady(context_));
  v1::FetchRequest request;
  PBS_ABSL_RETURN_IF_ERROR(FromWire(wire::DecodeMessage(buffer, &request)));
  PBS_ABSL_ASSIGN_OR_RETURN(lease_, service_.parts.leases.Find(request.ticket()));
  const KvShape& shape = lease_.kv->cache().shape();
  PBS_ABSL_ASSIGN_OR_RETURN(const KvRange range, DecodeKvRange(request, shape));
  PBS_ABSL_ASSIGN_OR_RETURN(
      const KvFormat format,
      DecodeKvFormat(request, service_.options.transport.chunk_bytes));
  PBS_ABSL_ASSIGN_OR_RETURN(
      exporter_,
      KvExporter::Create(lease_.kv, service_.parts.leases.epoch(), range, format));
  PBS_ABSL_ASSIGN_OR_RETURN(
      buffers_, service_.Reserve(kBuffersPerCall *
                                 KvExporter::BufferBytes(shape, range, format)));
  return absl::OkStatus();
}

void FetchCall::Fail(absl::Status status) {
  MutexLock lock(mutex_);
  if (!failure_.has_value()) failure_ = std::move(status);
  loop_.Wake();
}

absl::Status FetchCall::CheckSource() const {
  const LeaseEnd end = lease_.end->load();
  if (end == LeaseEnd::kGone) return LeaseStore::NotFound();
  const absl::Status prefill = lease_.kv->status();
  if (end == LeaseEnd::kNone && prefill.ok()) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("the prefill of this ticket ended early: ",
                                             absl::StatusCodeToString(prefill.code())));
}

NextWrite FetchCall::Next() {
  bool waiting;
  uint64_t waiter;
  {
    MutexLock lock(mutex_);
    waiting = waiting_;
    waiter = waiter_;
    if (failure_.has_value() && !waiting) return NextWrite::End(*failure_);
    if (!failure_.has_value() && waiting) return NextWrite::Wait();
  }
  if (waiting) {  // failed: take the callback back, or let it run first
    if (!lease_.kv->CancelWait(waiter)) return NextWrite::Wait();
    MutexLock lock(mutex_);
    waiting_ = false;
    return NextWrite::End(*failure_);
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

void FetchCall::End(const absl::Status& status) {
  guard_.Disarm();
  if (status.ok()) {
    transfer_.Complete();
    service_.parts.leases.MarkExported(lease_.ticket, exporter_->held_bytes());
  } else {
    transfer_.Fail(status);
  }
  exporter_.reset();
  lease_ = {};
  buffers_.Reset();
  Finish(record_.End(status));
}

}  // namespace pbs::server
