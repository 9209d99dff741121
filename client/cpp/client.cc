#include "client/cpp/client.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cpp/lease_keeper.h"
#include "proto/wire/messages.h"

namespace pbs::client {
namespace {

constexpr char kGetServerInfo[] = "/pbs.v1.Prefill/GetServerInfo";
constexpr char kListModels[] = "/pbs.v1.Prefill/ListModels";
constexpr char kPrefill[] = "/pbs.v1.Prefill/Prefill";
constexpr char kDescribe[] = "/pbs.v1.KvSource/Describe";
constexpr char kFetch[] = "/pbs.v1.KvSource/Fetch";
constexpr char kRenew[] = "/pbs.v1.KvSource/Renew";
constexpr char kRelease[] = "/pbs.v1.KvSource/Release";

// The largest chunk, or the largest other message: a vocabulary's logits.
constexpr int kReceiveBytesMax = (16 << 20) + (64 << 10);

// The limit that counts for pings in later versions of gRPC than we are built with.
constexpr char kPingTimeoutArgument[] = "grpc.http2.ping_timeout_ms";

int Millis(absl::Duration duration) {
  return static_cast<int>(absl::ToInt64Milliseconds(duration));
}

grpc::ChannelArguments ArgumentsOf(const ClientOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, options.stream_window_bytes);
  arguments.SetMaxReceiveMessageSize(kReceiveBytesMax);
  // A long prefill is silent: pings tell a slow server from a dead one.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, Millis(options.keepalive));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, Millis(options.keepalive_timeout));
  arguments.SetInt(kPingTimeoutArgument, Millis(options.keepalive_timeout));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A connection per client, and no detour through a proxy named in the environment.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return arguments;
}

// What a retry on the same ticket can mend.
bool IsBroken(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsCancelled(status) ||
         absl::IsUnknown(status) || absl::IsInternal(status);
}

template <class Reply, class Request>
absl::StatusOr<Reply> Ask(const std::shared_ptr<grpc::Channel>& channel,
                          const char* method, const CallTerms& terms,
                          const Request& request) {
  Reply reply;
  if (absl::Status status = CallUnary(channel, method, terms, request, &reply);
      !status.ok()) {
    return status;
  }
  return reply;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Client>> Client::Connect(const ClientOptions& options) {
  auto channel = grpc::CreateCustomChannel(
      options.address, grpc::InsecureChannelCredentials(), ArgumentsOf(options));
  if (!channel->WaitForConnected(
          absl::ToChronoTime(absl::Now() + options.connect_timeout))) {
    return absl::UnavailableError(
        absl::StrCat("no server answers at ", options.address, " within ",
                     absl::FormatDuration(options.connect_timeout),
                     "; start one with: pbs-prefilld ", "--listen ", options.address,
                     " --model NAME=FOLDER"));
  }
  return std::unique_ptr<Client>(new Client(options, std::move(channel)));
}

CallTerms Client::ControlTerms(CallTerms terms) const {
  terms.deadline = std::min(terms.deadline, absl::Now() + options_.control_timeout);
  return terms;
}

std::shared_ptr<grpc::Channel> Client::ChannelOf(const v1::KvTicket& ticket) {
  const std::string& endpoint = ticket.endpoint();
  if (endpoint.empty() || endpoint == options_.address || !options_.follow_endpoints) {
    return channel_;
  }
  absl::MutexLock lock(&mutex_);
  std::shared_ptr<grpc::Channel>& home = homes_[endpoint];
  if (home == nullptr) {
    home = grpc::CreateCustomChannel(endpoint, grpc::InsecureChannelCredentials(),
                                     ArgumentsOf(options_));
  }
  return home;
}

absl::StatusOr<v1::ServerInfo> Client::GetServerInfo(const CallTerms& terms) {
  return Ask<v1::ServerInfo>(channel_, kGetServerInfo, ControlTerms(terms),
                             v1::GetServerInfoRequest());
}

absl::StatusOr<v1::ListModelsResponse> Client::ListModels(const CallTerms& terms) {
  return Ask<v1::ListModelsResponse>(channel_, kListModels, ControlTerms(terms),
                                     v1::ListModelsRequest());
}

absl::StatusOr<v1::KvDescriptor> Client::Describe(const v1::KvTicket& ticket,
                                                  const CallTerms& terms) {
  return Ask<v1::KvDescriptor>(ChannelOf(ticket), kDescribe, ControlTerms(terms),
                               ticket);
}

absl::StatusOr<v1::KvLease> Client::Renew(const v1::KvTicket& ticket,
                                          std::optional<int32_t> ttl_seconds,
                                          const CallTerms& terms) {
  v1::RenewRequest request;
  *request.mutable_ticket() = ticket;
  if (ttl_seconds.has_value()) request.set_ttl_seconds(*ttl_seconds);
  return Ask<v1::KvLease>(ChannelOf(ticket), kRenew, ControlTerms(terms), request);
}

absl::Status Client::Release(const v1::KvTicket& ticket, const CallTerms& terms) {
  v1::ReleaseRequest request;
  *request.mutable_ticket() = ticket;
  regions_.Drop(ticket);
  return Ask<v1::ReleaseResponse>(ChannelOf(ticket), kRelease, ControlTerms(terms),
                                  request)
      .status();
}

// ---- Fetch

namespace {

// The description has no checksum of its own: its sizes must agree.
absl::Status CheckSizes(const v1::KvDescriptor& kv) {
  KvExpectation whole;
  whole.token_count = kv.num_tokens();
  whole.head_count = kv.num_kv_heads();
  whole.head_dim = kv.head_dim();
  whole.dtype = kv.dtype();
  const bool positive = kv.num_layers() > 0 && kv.num_tokens() > 0 &&
                        kv.num_kv_heads() > 0 && kv.head_dim() > 0;
  // Each size is below 2^31, so the product may leave int64.
  const double bytes = 2.0 * kv.num_layers() * static_cast<double>(whole.row_bytes()) *
                       kv.num_kv_heads() * kv.num_tokens();
  if (positive && bytes == static_cast<double>(kv.bytes())) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(
      "the cache is described with ", kv.num_layers(), " layers, ", kv.num_kv_heads(),
      " KV heads, ", kv.num_tokens(), " tokens, head dim ", kv.head_dim(), " and ",
      kv.bytes(), " bytes, which do not agree"));
}

KvExpectation ExpectationOf(const v1::FetchRequest& request, const v1::KvDescriptor& kv,
                            std::optional<v1::DType> stored) {
  KvExpectation e;
  e.epoch = request.ticket().epoch();
  e.layer_begin = request.layer_begin();
  e.layer_count = request.has_layer_count() ? request.layer_count()
                                            : kv.num_layers() - e.layer_begin;
  e.token_begin = request.token_begin();
  e.token_count = request.has_token_count() ? request.token_count()
                                            : kv.num_tokens() - e.token_begin;
  e.head_begin = request.head_begin();
  e.head_count = request.has_head_count() ? request.head_count()
                                          : kv.num_kv_heads() - e.head_begin;
  e.head_dim = kv.head_dim();
  e.dtype = request.has_dtype() ? request.dtype() : kv.dtype();
  e.stored = stored.value_or(kv.dtype());
  if (request.has_page_tokens()) e.page_tokens = std::max(1, request.page_tokens());
  e.layout = request.layout() == v1::NHD ? v1::NHD : v1::HND;
  e.checksums = !request.has_checksums() || request.checksums();
  return e;
}

}  // namespace

absl::Status Client::Fetch(v1::FetchRequest request, KvTarget& target,
                           const CallTerms& terms, std::optional<v1::DType> stored) {
  const absl::StatusOr<v1::KvDescriptor> kv = Describe(request.ticket(), terms);
  if (!kv.ok()) return kv.status();
  if (absl::Status sizes = CheckSizes(*kv); !sizes.ok()) return sizes;
  const LeaseKeeper keeper(*this, *kv, terms.deadline);
  if (!request.has_shared_memory()) {
    request.set_shared_memory(!options_.shared_memory_socket.empty());
  }
  const KvExpectation expected = ExpectationOf(request, *kv, stored);
  if (!request.shared_memory()) {
    KvReceiver receiver(expected, target);
    return FetchRanges(std::move(request), expected, receiver, terms);
  }
  if (options_.shared_memory_socket.empty()) {
    return absl::InvalidArgumentError(
        "shared_memory true needs ClientOptions.shared_memory_socket");
  }
  const auto mapped =
      regions_.Get(request.ticket(), kv->bytes(),
                   std::min(options_.connect_timeout, terms.deadline - absl::Now()));
  if (!mapped.ok()) return mapped.status();
  const v1::KvTicket ticket = request.ticket();
  const KvRegion region = {(*mapped)->bytes(), *mapped, [this, &ticket, &terms] {
                             return Describe(ticket, terms).status();
                           }};
  KvReceiver receiver(expected, target, &region);
  absl::Status status = FetchRanges(std::move(request), expected, receiver, terms);
  if (status.ok()) return status;
  regions_.Drop(ticket);
  // Wrong bytes are zeros where the server has taken the memory away: the lease ended.
  if (!absl::IsDataLoss(status)) return status;
  const absl::Status held = region.still_held();
  return absl::IsNotFound(held) ? held : status;
}

absl::Status Client::FetchRanges(v1::FetchRequest request,
                                 const KvExpectation& expected, KvReceiver& receiver,
                                 const CallTerms& terms) {
  CallTerms attempt_terms = terms;
  int failures = 0;
  absl::Status broken = absl::OkStatus();
  while (true) {
    const int32_t layer = receiver.layer();
    const int64_t bytes = receiver.bytes();
    request.set_layer_begin(layer);
    request.set_layer_count(expected.layer_begin + expected.layer_count - layer);
    const absl::Status status = FetchOnce(request, attempt_terms, receiver);
    if (status.ok() || receiver.complete()) return absl::OkStatus();
    // The lease went with whatever broke the stream: that is the reason.
    if (absl::IsNotFound(status) && !broken.ok()) return broken;
    if (!IsBroken(status)) return status;
    failures = receiver.bytes() > bytes ? 1 : failures + 1;
    if (failures > options_.resume_attempts) return status;
    broken = status;
    receiver.Resume();
    request.clear_resume();
    if (const auto place = receiver.place(); place.has_value()) {
      *request.mutable_resume() = *place;
    }
    // Only the way back is timed.
    attempt_terms.deadline =
        std::min(terms.deadline, absl::Now() + options_.connect_timeout);
    if (!AwaitReturn(request.ticket(), attempt_terms).ok()) return broken;
    attempt_terms = terms;
  }
}

// Waits for the connection; not OK when the server does not come back or the lease is
// gone. A call that begins while the broken connection is being taken down falls with
// it, hence the tries.
absl::Status Client::AwaitReturn(const v1::KvTicket& ticket, CallTerms terms) {
  constexpr int kTries = 6;
  absl::Duration pause = absl::Milliseconds(5);
  terms.wait_for_ready = true;
  absl::Status status;
  for (int i = 0; i < kTries; ++i) {
    status = Describe(ticket, terms).status();
    if (!IsBroken(status)) return status;
    absl::SleepFor(pause);
    pause *= 2;
  }
  return status;
}

absl::Status Client::FetchOnce(const v1::FetchRequest& request, const CallTerms& terms,
                               KvReceiver& receiver) {
  RawStream stream(ChannelOf(request.ticket()), kFetch, terms);
  if (stream.Write(wire::EncodeMessage(request))) stream.WritesDone();
  grpc::ByteBuffer message;
  while (stream.Read(&message)) {
    wire::KvChunk chunk;
    absl::Status status = FromGrpc(wire::DecodeKvChunk(message, &chunk));
    if (!status.ok()) return absl::DataLossError(status.message());
    status = receiver.Add(chunk);
    if (!status.ok()) return status;
  }
  absl::Status status = stream.Finish();
  if (status.ok() && !receiver.complete()) {
    return absl::DataLossError(absl::StrCat(
        "the stream ended in layer ", receiver.layer(), " before the last chunk"));
  }
  return status;
}

// ---- Prefill

namespace {

absl::StatusOr<KvExpectation> ExpectInline(const v1::PrefillRequest& request,
                                           const v1::Admitted& admitted) {
  const v1::KvShape& shape = admitted.shape();
  if (shape.num_layers() < 1 || shape.num_kv_heads() < 1 || shape.head_dim() < 1) {
    return absl::DataLossError(absl::StrCat(
        "`admitted` has a cache of ", shape.num_layers(), " layers, ",
        shape.num_kv_heads(), " KV heads and head dim ", shape.head_dim()));
  }
  const v1::KvDelivery::Inline& wishes = request.delivery().inline_();
  KvExpectation e;
  e.epoch = admitted.epoch();
  e.layer_count = shape.num_layers();
  e.token_count = request.token_ids_size();
  e.head_count = shape.num_kv_heads();
  e.head_dim = shape.head_dim();
  e.dtype = wishes.has_dtype() ? wishes.dtype() : shape.dtype();
  e.stored = shape.dtype();
  if (wishes.has_page_tokens()) e.page_tokens = std::max(1, wishes.page_tokens());
  e.layout = wishes.layout() == v1::NHD ? v1::NHD : v1::HND;
  e.checksums = !wishes.has_checksums() || wishes.checksums();
  return e;
}

// Reads the events of one prefill.
class EventReader {
 public:
  EventReader(const v1::PrefillRequest& request, PrefillObserver& observer,
              KvTarget* inline_kv)
      : request_(request), observer_(observer), inline_kv_(inline_kv) {}

  absl::Status Add(const grpc::ByteBuffer& message) {
    wire::PrefillEvent event;
    if (const auto status = FromGrpc(wire::DecodePrefillEvent(message, &event));
        !status.ok()) {
      return absl::DataLossError(status.message());
    }
    if (const auto* admitted = std::get_if<v1::Admitted>(&event)) {
      return Admit(*admitted);
    }
    if (const auto* layer = std::get_if<v1::LayerDone>(&event)) {
      observer_.OnLayer(*layer);
    } else if (const auto* chunk = std::get_if<wire::KvChunk>(&event)) {
      return receiver_.has_value()
                 ? receiver_->Add(*chunk)
                 : absl::DataLossError("a chunk that nobody asked for");
    } else if (auto* end = std::get_if<v1::Done>(&event)) {
      done_ = std::move(*end);
    }
    return absl::OkStatus();
  }

  // After the end of the stream.
  absl::StatusOr<v1::Done> Result() {
    if (!done_.has_value()) {
      return absl::DataLossError("the stream ended without `done`");
    }
    if (receiver_.has_value() && !receiver_->complete()) {
      return absl::DataLossError(absl::StrCat(
          "the stream ended in layer ", receiver_->layer(), " before the last chunk"));
    }
    if (inline_kv_ != nullptr && !receiver_.has_value()) {
      return absl::DataLossError("the server sent `done` without `admitted`");
    }
    return *std::move(done_);
  }

 private:
  absl::Status Admit(const v1::Admitted& admitted) {
    if (inline_kv_ != nullptr) {
      const absl::StatusOr<KvExpectation> expected = ExpectInline(request_, admitted);
      if (!expected.ok()) return expected.status();
      receiver_.emplace(*expected, *inline_kv_);
    }
    observer_.OnAdmitted(admitted);
    return absl::OkStatus();
  }

  const v1::PrefillRequest& request_;
  PrefillObserver& observer_;
  KvTarget* const inline_kv_;  // null unless the delivery is inline
  std::optional<KvReceiver> receiver_;
  std::optional<v1::Done> done_;
};

}  // namespace

absl::StatusOr<v1::Done> Client::Prefill(const v1::PrefillRequest& request,
                                         PrefillObserver& observer, KvTarget* inline_kv,
                                         const CallTerms& terms) {
  const bool is_inline = request.delivery().has_inline_();
  if (is_inline && inline_kv == nullptr) {
    return absl::InvalidArgumentError("delivery inline needs a KvTarget");
  }
  EventReader reader(request, observer, is_inline ? inline_kv : nullptr);
  RawStream stream(channel_, kPrefill, terms);
  if (stream.Write(wire::EncodeMessage(request))) stream.WritesDone();
  grpc::ByteBuffer message;
  while (stream.Read(&message)) {
    if (absl::Status status = reader.Add(message); !status.ok()) return status;
  }
  if (absl::Status status = stream.Finish(); !status.ok()) return status;
  return reader.Result();
}

}  // namespace pbs::client
