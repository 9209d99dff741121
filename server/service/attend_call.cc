#include "server/service/attend_call.h"

#include <grpc/grpc.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "server/base/status.h"
#include "server/codec/request_limits.h"
#include "server/codec/wire_status.h"

namespace pbs::server {

AttendCall::AttendCall(ServiceContext& service, grpc::CallbackServerContext& context)
    : StreamCall(service, context, Rpc::kAttend), context_(context) {
  Start();
  if (absl::Status status = service.CheckAdmitting(context); !status.ok()) {
    Fail(status);
    return;
  }
  auto slot =
      service.TakeUploadSlot([this](const absl::Status& reason) { Fail(reason); });
  if (!slot.ok()) {
    Fail(slot.status());
    return;
  }
  slot_ = *std::move(slot);
  const int32_t seconds = service.options.limits.upload_seconds_max;
  guard_.Limit(
      absl::Seconds(seconds),
      absl::StrCat("the upload took longer than upload_seconds_max ", seconds));
  StartRead(&read_);
}

void AttendCall::OnReadDone(bool ok) {
  const absl::Status status = ok ? Read() : EndUpload();
  read_.Clear();
  if (!status.ok()) {
    upload_.reset();  // before the caller gets the status
    slot_.Reset();
    Fail(status);
    return;
  }
  if (ok) StartRead(&read_);
}

absl::Status AttendCall::Read() {
  {
    MutexLock lock(mutex_);
    if (failure_.has_value()) return *failure_;  // no point in reading on
  }
  wire::AttendRequest message;
  PBS_ABSL_RETURN_IF_ERROR(FromWire(wire::DecodeAttendRequest(read_, &message)));
  if (const auto* header = std::get_if<v1::AttendHeader>(&message)) {
    return TakeHeader(*header);
  }
  const auto* chunk = std::get_if<wire::TensorChunk>(&message);
  if (chunk == nullptr) {
    return absl::InvalidArgumentError("a message is neither a header nor a chunk");
  }
  if (upload_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "chunk of tensor ", TensorLabel(chunk->tensor), " before the header"));
  }
  return upload_->Add(*chunk);
}

absl::Status AttendCall::TakeHeader(const v1::AttendHeader& header) {
  if (upload_ != nullptr) {
    return absl::InvalidArgumentError("a second header in one call");
  }
  record_.set_request_id(header.request_id().substr(0, kRequestTextBytesMax));
  PBS_ABSL_RETURN_IF_ERROR(slot_.Admit());
  AttendLimits limits;
  limits.tokens_max = service_.options.limits.attend_tokens_max;
  PBS_ABSL_ASSIGN_OR_RETURN(spec_, DecodeAttendHeader(header, limits));
  PBS_ABSL_ASSIGN_OR_RETURN(
      AttendReservation reservation,
      service_.parts.engine.ReserveAttend(spec_->problem, spec_->wanted));
  terms_.request_id = header.request_id();
  terms_.deadline = deadline_.time();
  PBS_ABSL_ASSIGN_OR_RETURN(
      upload_,
      AttendUpload::Create(*spec_, std::move(reservation), service_.upload_blocks));
  return absl::OkStatus();
}

absl::Status AttendCall::EndUpload() {
  guard_.Met();
  // No half-close: the call is over, and OnCancel() may be yet to come.
  if (grpc_call_failed_before_recv_message(context_.c_call()) != 0) {
    return service_.WhyCut(deadline_);
  }
  if (upload_ == nullptr) {
    return absl::InvalidArgumentError("the call ended before its header");
  }
  PBS_ABSL_RETURN_IF_ERROR(upload_->Finish());
  const bool takes_time = upload_->takes_time();
  {
    MutexLock lock(mutex_);
    if (failure_.has_value()) return *failure_;
    ++references_;  // Submit()'s
    queued_ = takes_time;
  }
  if (takes_time) {
    service_.background.Post([this] { Submit(); });
  } else {
    Submit();
  }
  return absl::OkStatus();
}

void AttendCall::Submit() {
  std::unique_ptr<AttendUpload> upload = TakeUpload();
  absl::StatusOr<AttendJob> job = absl::CancelledError("the call ended before its job");
  if (upload != nullptr) job = upload->MakeJob(std::move(terms_), stop_);
  upload.reset();
  {
    MutexLock lock(mutex_);
    ++references_;  // the job's; it may end before SubmitAttend() returns
  }
  absl::StatusOr<Admission> admission =
      job.ok() ? service_.parts.engine.SubmitAttend(*std::move(job), *this)
               : absl::StatusOr<Admission>(std::move(job).status());
  if (!admission.ok()) {
    OnDone(std::move(admission).status());
  } else if (const absl::Status failure = StoreJob(admission->id); !failure.ok()) {
    service_.parts.engine.Cancel(admission->id, CancelReasonOf(failure));
  }
  slot_.Reset();
  MutexLock lock(mutex_);
  --references_;
  loop_.Wake();
}

// Null when the call has failed; then nothing of the upload is left.
std::unique_ptr<AttendUpload> AttendCall::TakeUpload() {
  std::unique_ptr<AttendUpload> upload;  // freed after the lock is released
  MutexLock lock(mutex_);
  queued_ = false;
  upload = std::move(upload_);
  if (failure_.has_value()) return nullptr;
  return upload;
}

// Not OK when the call failed before the job could be cancelled by its id.
absl::Status AttendCall::StoreJob(JobId id) {
  MutexLock lock(mutex_);
  job_ = id;
  return failure_.value_or(absl::OkStatus());
}

void AttendCall::OnFailed(const absl::Status& status) {
  JobId job = 0;
  std::unique_ptr<AttendUpload> dropped;  // freed after the lock is released
  stop_ = true;
  {
    MutexLock lock(mutex_);
    job = job_;
    if (queued_) dropped = std::move(upload_);
  }
  // Without the lock: a waiting job ends, and calls OnDone(), before this returns.
  if (job != 0) service_.parts.engine.Cancel(job, CancelReasonOf(status));
}

// The lock covers Wake(): once the last reference is gone the call may end at any time.
void AttendCall::OnDone(absl::StatusOr<AttendResult> result) {
  MutexLock lock(mutex_);
  if (result.ok()) {
    result_ = *std::move(result);
  } else if (!failure_.has_value()) {
    failure_ = std::move(result).status();
  }
  --references_;
  loop_.Wake();
}

bool AttendCall::LetGo() {
  MutexLock lock(mutex_);
  return references_ == 0;
}

NextWrite AttendCall::NextMessage() {
  {
    MutexLock lock(mutex_);
    if (references_ > 0 || (reply_ == nullptr && !result_.has_value())) {
      return NextWrite::Wait();
    }
    if (reply_ == nullptr) {
      reply_ = std::make_unique<AttendReply>(*spec_, service_.options.backend,
                                             service_.options.transport.chunk_bytes,
                                             *std::move(result_), service_.parts.clock);
      result_.reset();
    }
  }
  if (auto message = reply_->Next()) return NextWrite::Message(*std::move(message));
  service_.parts.metrics.engine.StageTime(Stage::kSend).Observe(reply_->send_seconds());
  return NextWrite::End(absl::OkStatus());
}

void AttendCall::Release(const absl::Status&) {
  reply_.reset();
  MutexLock lock(mutex_);
  result_.reset();  // of a job that was done when the call failed
}

}  // namespace pbs::server
