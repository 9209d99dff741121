#include "server/service/prefill_call.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "proto/wire/messages.h"
#include "server/base/status.h"
#include "server/codec/prompt_digest.h"
#include "server/codec/request_limits.h"
#include "server/codec/sparsity_digest.h"
#include "server/codec/wire_status.h"
#include "server/engine/threshold_ladder.h"

namespace pbs::server {
namespace {

PrefillLimits LimitsOf(const ServiceContext& service, const ServedModel& model,
                       const CallDeadline& deadline) {
  const ModelConfig& config = model.model().config();
  PrefillLimits limits;
  limits.tokens_max = std::min(model.tokens_max, service.options.limits.tokens_max);
  if (limits.tokens_max == config.max_tokens) {
    limits.tokens_max_reason = config.max_tokens_reason;
  }
  limits.vocab_size = config.vocab_size;
  limits.num_layers = config.num_layers;
  limits.num_heads = config.num_heads;
  limits.num_kv_heads = config.num_kv_heads;
  limits.head_dim = config.head_dim;
  limits.default_attention = service.options.default_attention;
  limits.profiles = model.profiles;
  limits.model_name = model.name;
  limits.has_deadline = deadline.time() != absl::InfiniteFuture();
  limits.chunk_bytes_default = service.options.transport.chunk_bytes;
  limits.push_targets = service.options.push_targets;
  return limits;
}

// The format in which the call itself sends the cache; null when it does not.
const KvFormat* SentFormat(const PrefillSpec& spec) {
  if (spec.delivery == Delivery::kInline) return &spec.inline_format;
  return spec.delivery == Delivery::kPush ? &spec.push_format : nullptr;
}

}  // namespace

PrefillCall::PrefillCall(ServiceContext& service, grpc::CallbackServerContext& context,
                         const grpc::ByteBuffer& request)
    : StreamCall(service, context, Rpc::kPrefill),
      stream_(service, [this] { loop_.Wake(); }),
      lease_end_([this] { OnKvEnded(); }) {
  Start();
  if (absl::Status status = Open(context, request); !status.ok()) Fail(status);
}

absl::Status PrefillCall::Open(const grpc::CallbackServerContext& context,
                               const grpc::ByteBuffer& buffer) {
  PBS_ABSL_RETURN_IF_ERROR(service_.CheckAdmitting(context));
  v1::PrefillRequest request;
  PBS_ABSL_RETURN_IF_ERROR(FromWire(wire::DecodeMessage(buffer, &request)));
  record_.set_request_id(request.request_id().substr(0, kRequestTextBytesMax));
  PBS_ABSL_RETURN_IF_ERROR(Decode(request));
  if (spec_.delivery == Delivery::kLease) {
    PBS_ABSL_ASSIGN_OR_RETURN(const bool exists, BeginLease());
    if (exists) return absl::OkStatus();
  }
  return Submit();
}

absl::Status PrefillCall::Decode(const v1::PrefillRequest& request) {
  PBS_ABSL_ASSIGN_OR_RETURN(model_, service_.FindModel(request.model()));
  PBS_ABSL_ASSIGN_OR_RETURN(
      spec_, DecodePrefill(request, LimitsOf(service_, *model_, deadline_)));
  facts_.prompt_tokens = static_cast<int32_t>(spec_.tokens.size());
  facts_.model_digest = model_->model().digest();
  if (!spec_.idempotency_key.empty()) {
    fingerprint_ = PrefillFingerprint(spec_, facts_.model_digest);
  }
  if (spec_.threshold_min.has_value()) FitDeadline();
  facts_.sparsity_digest = SparsityDigest(spec_.attention, facts_.prompt_tokens,
                                          spec_.tenant_salt, spec_.thresholds_digest);
  return absl::OkStatus();
}

void PrefillCall::FitDeadline() {
  const JobTerms terms = {spec_.request_id, deadline_.time(), spec_.priority};
  const absl::Duration left = deadline_.time() - service_.parts.clock.Now();
  const auto fits = [&](float threshold) {
    AttentionOptions attention = spec_.attention;
    attention.threshold = threshold;
    const std::optional<double> seconds = service_.parts.engine.PredictPrefill(
        *model_, facts_.prompt_tokens, attention, {}, terms);
    return !seconds.has_value() || absl::Seconds(*seconds) <= left;
  };
  const float asked = spec_.attention.threshold;
  spec_.attention.threshold = HighestThatFits(asked, *spec_.threshold_min, fits);
  threshold_lowered_ = spec_.attention.threshold < asked;
}

// True when the request's key names work that is done: its reply is on the way.
absl::StatusOr<bool> PrefillCall::BeginLease() {
  LeaseRequest wanted;
  wanted.model = model_->name;
  wanted.model_digest = facts_.model_digest;
  wanted.sparsity_digest = facts_.sparsity_digest;
  wanted.prompt_digest = PromptDigest(spec_.tokens);
  wanted.ttl_seconds = spec_.ttl_seconds;
  wanted.idempotency_key = spec_.idempotency_key;
  wanted.fingerprint = fingerprint_;
  absl::StatusOr<BegunLease> begun = service_.parts.leases.Begin(wanted);
  if (!begun.ok()) {
    if (absl::IsResourceExhausted(begun.status())) {
      service_.parts.metrics.engine.Rejected(RejectReason::kLeases).Increment();
    }
    return std::move(begun).status();
  }
  if (begun->existing.has_value()) {
    PBS_ABSL_RETURN_IF_ERROR(ReplyWithExisting(*begun->existing));
    return true;
  }
  lease_ = std::move(begun->pending);
  return false;
}

absl::Status PrefillCall::ReplyWithExisting(const LeaseView& lease) {
  PBS_ABSL_ASSIGN_OR_RETURN(result_bytes_, service_.Reserve(ResultBytes()));
  v1::Done done = *lease.done;
  done.set_lease_expires_unix_ms(absl::ToUnixMillis(lease.expires));
  MutexLock lock(mutex_);
  events_.push_back(EncodeAdmitted(&lease.ticket, Admission{},
                                   lease.kv->cache().shape(),
                                   service_.parts.leases.epoch()));
  events_.push_back(EncodeDoneEvent(done));
  admitted_ = true;
  ending_ = true;
  loop_.Wake();
  return absl::OkStatus();
}

int64_t PrefillCall::ResultBytes() const {
  const ModelConfig& config = model_->model().config();
  return PrefillResultBytes(spec_, config.vocab_size, config.num_layers);
}

// Everything the request will hold, charged at once.
absl::StatusOr<PrefillReservation> PrefillCall::Reserve() {
  const KvShape shape = model_->model().kv_shape(facts_.prompt_tokens);
  const KvRange whole = WholeRange(shape);
  const int64_t result_bytes = ResultBytes();
  const KvFormat* const format = SentFormat(spec_);
  const int64_t buffer_bytes =
      format != nullptr ? KvStream::BufferBytes(shape, whole, *format) : 0;
  PBS_ABSL_ASSIGN_OR_RETURN(PrefillReservation reserved,
                            service_.parts.engine.ReservePrefill(
                                *model_, {.num_tokens = facts_.prompt_tokens,
                                          .attention = spec_.attention,
                                          .logit_positions = spec_.logit_positions,
                                          .reply_bytes = result_bytes + buffer_bytes,
                                          .query_layers = spec_.query_layers,
                                          .head_thresholds = spec_.head_thresholds}));
  facts_.planned_bytes = shape.bytes() + reserved.kv->queries().bytes() +
                         reserved.workspace.host.bytes() +
                         reserved.workspace.device.bytes() + reserved.reply.bytes();
  kv_ = reserved.kv;
  ByteReservation buffers = reserved.reply.Split(buffer_bytes);
  result_bytes_ = std::move(reserved.reply);
  PBS_ABSL_RETURN_IF_ERROR(OpenDelivery(std::move(buffers)));
  return reserved;
}

absl::Status PrefillCall::OpenDelivery(ByteReservation buffers) {
  const KvFormat* const format = SentFormat(spec_);
  if (format == nullptr) return absl::OkStatus();
  const uint64_t epoch = service_.parts.leases.epoch();
  PBS_ABSL_ASSIGN_OR_RETURN(
      std::unique_ptr<KvExporter> exporter,
      KvExporter::Create(kv_, epoch, WholeRange(kv_->cache().shape()), *format));
  if (spec_.delivery == Delivery::kInline) {
    stream_.Open(kv_, std::move(exporter), std::move(buffers));
    return absl::OkStatus();
  }
  PushContent content = {.target = spec_.push_target,
                         .facts = {.request_id = spec_.request_id,
                                   .model = model_->name,
                                   .model_digest = facts_.model_digest,
                                   .sparsity_digest = facts_.sparsity_digest,
                                   .prompt_digest = PromptDigest(spec_.tokens),
                                   .epoch = epoch},
                         .format = *format,
                         .kv = kv_,
                         .exporter = std::move(exporter),
                         .buffers = std::move(buffers)};
  PushListener& listener = *this;
  push_ = std::make_unique<PushStream>(service_, listener, std::move(content));
  return absl::OkStatus();
}

absl::Status PrefillCall::Submit() {
  PBS_ABSL_ASSIGN_OR_RETURN(PrefillReservation reserved, Reserve());
  if (lease_.valid()) {
    lease_.Attach(kv_);
    lease_end_.Start(kv_, kNoLayer);
  }
  PrefillJob job;
  job.terms = {spec_.request_id, deadline_.time(), spec_.priority};
  job.model = model_;
  job.tokens = std::move(spec_.tokens);
  job.logit_positions = spec_.logit_positions;
  job.top_logits = spec_.top_logits;
  job.all_logits_last_token = spec_.all_logits_last_token;
  job.kv = kv_;
  job.reservation = std::move(reserved.workspace);
  {
    MutexLock lock(mutex_);
    job_runs_ = true;  // it may end before SubmitPrefill() returns
  }
  absl::StatusOr<Admission> admission =
      service_.parts.engine.SubmitPrefill(std::move(job), *this);
  if (!admission.ok()) {
    MutexLock lock(mutex_);
    job_runs_ = false;
    return std::move(admission).status();
  }
  if (threshold_lowered_) {
    service_.parts.metrics.engine.threshold_lowered.Increment();
  }
  if (const absl::Status failure = Admit(*admission); !failure.ok()) {
    service_.parts.engine.Cancel(admission->id, CancelReasonOf(failure));
  } else if (push_ != nullptr) {
    StartPush();
  }
  return absl::OkStatus();
}

// At once, not with the first layer: a target that cannot take the cache fails the call
// before the work is done.
void PrefillCall::StartPush() {
  {
    MutexLock lock(mutex_);
    if (failure_.has_value()) return;
    push_runs_ = true;  // it may end before Start() returns
  }
  push_->Start();
}

// Not OK when the call failed before the job could be cancelled by its id.
absl::Status PrefillCall::Admit(const Admission& admission) {
  MutexLock lock(mutex_);
  job_ = admission.id;
  events_.push_front(EncodeAdmitted(lease_.valid() ? &lease_.ticket() : nullptr,
                                    admission, kv_->cache().shape(),
                                    service_.parts.leases.epoch()));
  admitted_ = true;
  loop_.Wake();
  return failure_.value_or(absl::OkStatus());
}

void PrefillCall::OnFailed(const absl::Status& status) {
  JobId job = 0;
  {
    MutexLock lock(mutex_);
    job = job_;
  }
  // Without the lock: a waiting job ends, and calls OnDone(), before this returns.
  if (job != 0) service_.parts.engine.Cancel(job, CancelReasonOf(status));
}

void PrefillCall::PushEvent(grpc::ByteBuffer event) {
  MutexLock lock(mutex_);
  events_.push_back(std::move(event));
  loop_.Wake();
}

// The holder does not want the cache any more: no point in filling it.
void PrefillCall::OnKvEnded() {
  if (!kv_->finished() && absl::IsNotFound(kv_->readable())) {
    Fail(absl::AbortedError("the lease was released while its prefill ran"));
  }
  loop_.Wake();
}

void PrefillCall::OnLayerDone(int32_t layer, double density, double seconds) {
  PushEvent(EncodeLayerDone(layer, density, seconds));
}

// The lock covers Wake(): without a job the call may end at any time.
void PrefillCall::OnDone(absl::StatusOr<PrefillResult> result) {
  MutexLock lock(mutex_);
  if (result.ok()) {
    result_ = *std::move(result);
  } else if (!failure_.has_value()) {
    failure_ = std::move(result).status();
  }
  job_runs_ = false;
  loop_.Wake();
}

void PrefillCall::OnPushEnd(const absl::Status& status) {
  // Cancelled: the call or its prefill has failed, and says so itself.
  if (!status.ok() && !absl::IsCancelled(status)) Fail(status);
  MutexLock lock(mutex_);
  push_runs_ = false;
  pushed_ = status.ok();
  loop_.Wake();
}

bool PrefillCall::LetGo() {
  if (!stream_.LetGo() || !lease_end_.Stop()) return false;
  {
    MutexLock lock(mutex_);
    if (!push_runs_) return !job_runs_;
  }
  push_->Cancel();
  return false;
}

NextWrite PrefillCall::NextMessage() {
  {
    MutexLock lock(mutex_);
    if (!admitted_) return NextWrite::Wait();
    if (!events_.empty()) {
      NextWrite next = NextWrite::Message(std::move(events_.front()));
      events_.pop_front();
      return next;
    }
  }
  if (stream_.is_open() && !stream_.done()) {
    auto chunk = stream_.Next();
    // A prefill that failed says so itself.
    if (!chunk.ok() || !chunk->has_value()) return NextWrite::Wait();
    return NextWrite::Message(wire::EncodeKvEvent(**chunk));
  }
  if (push_ != nullptr) {
    MutexLock lock(mutex_);
    if (!pushed_) return NextWrite::Wait();
  }
  return NextResult();
}

// `done` and, after it, the end.
NextWrite PrefillCall::NextResult() {
  std::optional<PrefillResult> result;
  {
    MutexLock lock(mutex_);
    if (!ending_ && !result_.has_value()) return NextWrite::Wait();
    result.swap(result_);
  }
  if (result.has_value()) return FinishResult(*std::move(result));
  return lease_end_.Stop() ? NextWrite::End(absl::OkStatus()) : NextWrite::Wait();
}

NextWrite PrefillCall::FinishResult(PrefillResult result) {
  if (stream_.is_open()) facts_.send_seconds = stream_.Complete();
  if (push_ != nullptr) facts_.send_seconds = push_->send_seconds();
  v1::Done done = EncodeDone(spec_, result, facts_, service_.options.backend);
  grpc::ByteBuffer event;
  if (lease_.valid()) {
    auto stored = lease_.Complete(std::move(done), std::move(result_bytes_));
    if (!stored.ok()) {
      Fail(std::move(stored).status());
      return NextWrite::Wait();
    }
    event = EncodeDoneEvent(**stored);
  } else {
    event = EncodeDoneEvent(done);
  }
  MutexLock lock(mutex_);
  ending_ = true;
  return NextWrite::Message(std::move(event));
}

void PrefillCall::Release(const absl::Status& status) {
  if (!status.ok()) stream_.Fail(status);
  stream_.Close();
  if (push_ != nullptr) push_->Close(status);
  push_.reset();
  kv_.reset();
  lease_ = {};
  result_bytes_.Reset();
}

}  // namespace pbs::server
