#include "server/service/push_stream.h"

#include <grpcpp/generic/generic_stub.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/base/random_id.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

constexpr char kMethod[] = "/pbs.v1.KvSink/Receive";
constexpr size_t kSinkTextBytesMax = 512;  // of a sink's message in ours

// Codes of a sink that the caller of the prefill gets as they are.
bool Passes(absl::StatusCode code) {
  return code == absl::StatusCode::kDataLoss ||
         code == absl::StatusCode::kFailedPrecondition ||
         code == absl::StatusCode::kResourceExhausted;
}

}  // namespace

PushStream::PushStream(ServiceContext& service, PushListener& listener,
                       PushContent content)
    : service_(service),
      listener_(listener),
      target_(std::move(content.target)),
      stream_(service, [this] { loop_.Wake(); }),
      credit_(RandomHandle(), static_cast<uint64_t>(content.exporter->total_bytes())),
      loop_(*this, service.movers),
      guard_(service.parts.timers, service.parts.clock,
             [this](const absl::Status& cut) { Fail(WhyCut(cut)); }) {
  {
    MutexLock lock(mutex_);
    content.facts.transfer_id = credit_.handle();
    content.facts.bytes = static_cast<int64_t>(credit_.total());
  }
  header_ =
      EncodePushHeader(content.facts, content.kv->cache().shape(), content.format);
  stream_.Open(std::move(content.kv), std::move(content.exporter),
               std::move(content.buffers));
}

void PushStream::Start() {
  guard_.Limit(kPushConnectMax, "");
  grpc::GenericStub stub(service_.push_targets.ChannelTo(target_));
  stub.PrepareBidiStreamingCall(&context_, kMethod, {}, this);
  AddHold();  // until End()
  StartRead(&ack_);
  StartCall();
  MutexLock lock(mutex_);
  started_ = true;
  loop_.Wake();
}

void PushStream::Cancel() {
  Fail(Failed(absl::StatusCode::kCancelled, "the prefill ended"));
}

// Every caller keeps this alive: the owner, the guard, a reaction or the write loop.
void PushStream::Fail(const absl::Status& reason) {
  bool started = false;
  {
    MutexLock lock(mutex_);
    if (failure_.has_value()) return;
    failure_ = reason;
    started = started_;
  }
  if (started) context_.TryCancel();  // a write that is stuck ends no other way
  MutexLock lock(mutex_);
  WakeLocked();
}

void PushStream::WakeLocked() {
  if (started_) loop_.Wake();
}

// ---- what is sent

NextWrite PushStream::Next() {
  bool ends = false;
  {
    MutexLock lock(mutex_);
    ends = failure_.has_value() || sink_ended_;
  }
  if (ends) {
    return stream_.LetGo() ? NextWrite::End(absl::CancelledError(""))
                           : NextWrite::Wait();
  }
  if (header_.Valid()) {
    waits_ = Waits::kWrite;
    NextWrite first = NextWrite::Message(header_);
    header_ = {};
    return first;
  }
  return NextChunk();
}

NextWrite PushStream::NextChunk() {
  if (!chunk_.has_value()) {
    if (stream_.done()) {
      waits_ = Waits::kEnd;
      return NextWrite::End(absl::OkStatus());
    }
    auto chunk = stream_.Next();
    if (!chunk.ok()) {
      Cancel();  // a prefill that failed says so itself
      return NextWrite::Wait();
    }
    waits_ = Waits::kNothing;
    if (!chunk->has_value()) return NextWrite::Wait();
    chunk_ = **std::move(chunk);
  }
  {
    MutexLock lock(mutex_);
    wanted_ = chunk_->payload.size();
    if (!credit_.Allows(wanted_)) {
      waits_ = Waits::kCredit;
      return NextWrite::Wait();
    }
    credit_.Send(wanted_);
  }
  waits_ = Waits::kWrite;
  NextWrite next = NextWrite::Message(wire::EncodeKvChunk(*chunk_));
  chunk_.reset();
  return next;
}

void PushStream::OnWriteDone(bool ok) {
  ++progress_;
  waits_ = Waits::kNothing;
  bool first = false;
  {
    MutexLock lock(mutex_);
    first = ok && !std::exchange(header_sent_, true);
  }
  if (first) {
    guard_.Met();
    guard_.Watch([this] { return ticks(); },
                 absl::Seconds(service_.options.transport.write_stall_seconds_max));
  }
  loop_.OnWriteDone(ok);
}

// The status of the call says why.
void PushStream::OnBroken() {
  MutexLock lock(mutex_);
  sink_ended_ = true;
}

void PushStream::End(const absl::Status& status) {
  bool fails = false;
  {
    MutexLock lock(mutex_);
    fails = failure_.has_value();
  }
  if (status.ok()) StartWritesDone();
  if (fails) context_.TryCancel();  // it may have failed before it was started
  RemoveHold();                     // OnDone() may run before this returns
}

// ---- what the sink says

void PushStream::OnReadDone(bool ok) {
  if (!ok) {
    MutexLock lock(mutex_);
    sink_ended_ = true;
    WakeLocked();
    return;
  }
  if (const absl::Status taken = TakeAck(); !taken.ok()) {
    Fail(Failed(taken.code(), taken.message()));
  }
  StartRead(&ack_);
}

absl::Status PushStream::TakeAck() {
  v1::KvAck ack;
  if (!wire::DecodeMessage(ack_, &ack).ok()) {
    return absl::FailedPreconditionError("it sent what is no KvAck");
  }
  MutexLock lock(mutex_);
  const uint64_t received = credit_.received();
  const uint64_t left = credit_.left();
  PBS_ABSL_RETURN_IF_ERROR(credit_.Take(ack));
  if (credit_.received() == received && credit_.left() <= left) return absl::OkStatus();
  ++progress_;
  WakeLocked();
  return absl::OkStatus();
}

// ---- the end

absl::Status PushStream::WhyCut(const absl::Status& cut) const {
  if (absl::IsDeadlineExceeded(cut)) {
    return Failed(absl::StatusCode::kUnavailable,
                  absl::StrCat("it took no call within ",
                               absl::ToInt64Seconds(kPushConnectMax), " seconds"));
  }
  const std::string limit =
      absl::StrCat(" for write_stall_seconds_max ",
                   service_.options.transport.write_stall_seconds_max, " seconds");
  MutexLock lock(mutex_);
  switch (waits_.load()) {
    case Waits::kCredit:
      return Failed(absl::StatusCode::kUnavailable,
                    absl::StrCat("it left the credit at ", credit_.left(), " bytes",
                                 limit, "; the next chunk has ", wanted_));
    case Waits::kEnd:
      return Failed(
          absl::StatusCode::kUnavailable,
          absl::StrCat("it did not end the call", limit, "; it confirmed ",
                       credit_.received(), " of ", credit_.total(), " bytes"));
    case Waits::kWrite:
    case Waits::kNothing:
      break;
  }
  return Failed(absl::StatusCode::kUnavailable, absl::StrCat("it read nothing", limit));
}

absl::Status PushStream::Failed(absl::StatusCode code, absl::string_view why) const {
  return {code, absl::StrCat("push to ", target_, ": ", why)};
}

absl::Status PushStream::Outcome(const grpc::Status& status) const {
  MutexLock lock(mutex_);
  if (failure_.has_value()) return *failure_;
  if (!status.ok()) {
    const auto code = static_cast<absl::StatusCode>(status.error_code());
    const std::string text = status.error_message().substr(0, kSinkTextBytesMax);
    return Failed(Passes(code) ? code : absl::StatusCode::kUnavailable,
                  absl::StrCat(absl::StatusCodeToString(code), ": ",
                               absl::Utf8SafeCHexEscape(text)));
  }
  if (credit_.complete()) return absl::OkStatus();
  return Failed(absl::StatusCode::kFailedPrecondition,
                absl::StrCat("it ended the call with OK when it had confirmed ",
                             credit_.received(), " of ", credit_.total(), " bytes"));
}

void PushStream::OnDone(const grpc::Status& status) {
  guard_.Disarm();
  const absl::Status outcome = Outcome(status);
  if (outcome.ok()) {
    send_seconds_ = stream_.Complete();
    complete_ = true;
  }
  listener_.OnPushEnd(outcome);
}

void PushStream::Close(const absl::Status& status) {
  bool by_sink = false;
  {
    MutexLock lock(mutex_);
    by_sink = started_ && !complete_ &&
              !(failure_.has_value() && absl::IsCancelled(*failure_));
  }
  if (by_sink) {
    stream_.Fail(TransferFailure::kSink);
  } else if (!status.ok()) {
    stream_.Fail(status);
  }
  stream_.Close();
}

}  // namespace pbs::server
