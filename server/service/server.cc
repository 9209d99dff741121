#include "server/service/server.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/grpcpp.h>
#include <grpcpp/resource_quota.h>

#include "server/base/connection_acceptor.h"
#include "server/base/listener.h"
#include "server/base/status.h"
#include "server/codec/request_limits.h"
#include "server/service/health.h"
#include "server/service/memory_formula.h"
#include "server/service/reflection.h"
#include "server/service/service_context.h"
#include "server/service/services.h"
#include "server/service/unknown_methods.h"
#include "server/service/unread_calls.h"

namespace pbs::server {
namespace {

// SERVING as long as the process listens: for probes that restart, not route.
constexpr char kLivenessService[] = "liveness";
constexpr const char* kServiceNames[] = {"pbs.v1.Prefill", "pbs.v1.Attention",
                                         "pbs.v1.KvSource"};
constexpr int kMillis = 1000;
// The limit that counts for pings in later versions of gRPC than we are built with.
constexpr char kPingTimeoutArgument[] = "grpc.http2.ping_timeout_ms";
// gRPC threads that run our callbacks; none of them ever waits.
constexpr int kQuotaThreads = 256;

absl::Status CheckOptions(const ServiceOptions& options) {
  const TransportOptions& transport = options.transport;
  const ServiceLimits& limits = options.limits;
  struct Setting {
    const char* name;
    int64_t value;
    SettingRange range;
  };
  for (const auto& [name, value, range] : {
           Setting{"transport.chunk_bytes", transport.chunk_bytes, kChunkBytesRange},
           Setting{"transport.connections_max", transport.connections_max,
                   kConnectionsRange},
           Setting{"transport.metadata_bytes_max", transport.metadata_bytes_max,
                   kMetadataBytesRange},
           Setting{"transport.concurrent_streams_max", transport.concurrent_streams_max,
                   kConcurrentStreamsRange},
           Setting{"transport.memory_quota_bytes", transport.memory_quota_bytes,
                   kMemoryQuotaBytesRange},
           Setting{"transport.stream_window_bytes", transport.stream_window_bytes,
                   kStreamWindowBytesRange},
           Setting{"transport.keepalive_seconds", transport.keepalive_seconds,
                   kKeepaliveSecondsRange},
           Setting{"transport.keepalive_timeout_seconds",
                   transport.keepalive_timeout_seconds, kKeepaliveSecondsRange},
           Setting{"transport.write_stall_seconds_max",
                   transport.write_stall_seconds_max, kWriteStallSecondsRange},
           Setting{"limits.tokens_max", limits.tokens_max, kTokensRange},
           Setting{"limits.attend_tokens_max", limits.attend_tokens_max, kTokensRange},
           Setting{"limits.upload_seconds_max", limits.upload_seconds_max,
                   kUploadSecondsRange},
           Setting{"limits.upload_requests_max", limits.upload_requests_max,
                   kUploadRequestsRange},
       }) {
    PBS_ABSL_RETURN_IF_ERROR(CheckRange(name, value, range.low, range.high));
  }
  return absl::OkStatus();
}

void SetTransport(const ServiceOptions& options, grpc::ServerBuilder& builder) {
  const TransportOptions& t = options.transport;
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES,
                             t.stream_window_bytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, t.concurrent_streams_max);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, t.keepalive_seconds * kMillis);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                             t.keepalive_timeout_seconds * kMillis);
  builder.AddChannelArgument(kPingTimeoutArgument,
                             t.keepalive_timeout_seconds * kMillis);
  // Connections without calls are pinged, too: a dead peer's must not stay.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // No number of a peer's pings ends its connection, which may carry others' calls.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  // From the start of a connection to its first bytes.
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
                             t.keepalive_timeout_seconds * kMillis);
  // Beyond its own limit gRPC ends the whole connection: calls are refused below it.
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE,
                             kMetadataConnectionFactor * t.metadata_bytes_max);
  // A compressed message grows before its size is looked at.
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  builder.SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder.SetMaxReceiveMessageSize(
      static_cast<int>(ReceiveMessageBytesMax(options.limits.tokens_max)));
  grpc::ResourceQuota quota("pbs");
  quota.Resize(static_cast<size_t>(t.memory_quota_bytes));
  quota.SetMaxThreads(kQuotaThreads);
  builder.SetResourceQuota(quota);
}

}  // namespace

struct GrpcServer::Impl {
  Impl(const ServiceOptions& options, const ServiceParts& parts)
      : context(options, parts),
        prefill(context),
        attention(context),
        source(context),
        health(context.movers),
        unknown(context) {}

  ~Impl() { context.parts.timers.Cancel(look); }

  // Looks for unread calls, again and again. Reflection answers calls that we do not
  // count.
  void WatchUnread() {
    if (context.options.reflection) return;
    if (const std::optional<int64_t> begun = CallsBegun(channelz_id)) {
      const int64_t seen = context.open_calls.begun() + health.begun();
      if (const int64_t more = unread.Look(*begun, seen); more > 0) TellUnread(more);
    }
    const ServiceParts& parts = context.parts;
    look = parts.timers.At(parts.clock.Now() + UnreadCalls::kLookInterval,
                           [this] { WatchUnread(); });
  }

  void TellUnread(int64_t calls) {
    context.parts.metrics.rpc.unread.Increment(static_cast<double>(calls));
    const int64_t bytes_max = ReceiveMessageBytesMax(context.options.limits.tokens_max);
    context.parts.log.Warning(
        "calls_unread",
        {{"calls", calls},
         {"receive_message_bytes_max", bytes_max},
         {"note",
          "gRPC refused them (longer than the limit, or compressed), or their callers "
          "left before the request was complete"}});
  }

  void SetServing(bool serving) {
    health.Set("", serving);
    for (const char* name : kServiceNames) health.Set(name, serving);
  }

  void Accept(Listener listener, const ServiceParts& parts);

  ServiceContext context;
  PrefillService prefill;
  AttentionService attention;
  KvSourceService source;
  HealthService health;
  UnknownMethods unknown;
  UnreadCalls unread;
  TimerId look = 0;
  int port = 0;
  int64_t channelz_id = 0;               // gRPC's number of `server`
  std::unique_ptr<grpc::Server> server;  // its calls use everything above
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> connections;
  std::unique_ptr<ConnectionAcceptor> acceptor;  // last: it uses `connections`
};

// gRPC's own listener gives up for good when the process runs out of descriptors.
void GrpcServer::Impl::Accept(Listener listener, const ServiceParts& parts) {
  const TransportOptions& transport = context.options.transport;
  port = listener.port;
  acceptor = std::make_unique<ConnectionAcceptor>(
      std::move(listener),
      AcceptorOptions{
          .connections_max = transport.connections_max,
          .unacknowledged_max = absl::Seconds(transport.keepalive_timeout_seconds)},
      [this](FileDescriptor connection, int socket) {
        grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters
            accepted;
        accepted.listener_fd = socket;
        accepted.fd = connection.Release();
        connections->HandleNewConnection(&accepted);
      },
      [&log = parts.log, limit = transport.connections_max](int64_t refused) {
        log.Warning("connections_refused",
                    {{"refused", refused},
                     {"connections_max", limit},
                     {"note", "raise transport.connections_max or ulimit -n"}});
      });
}

absl::StatusOr<std::unique_ptr<GrpcServer>> GrpcServer::Create(
    const ServiceOptions& options, const ServiceParts& parts) {
  PBS_ABSL_RETURN_IF_ERROR(CheckOptions(options));
  PBS_ABSL_ASSIGN_OR_RETURN(Listener listener, Listen("listen", options.listen));
  auto impl = std::make_unique<Impl>(options, parts);
  grpc::ServerBuilder builder;
  builder.SetOption(std::make_unique<ReflectionOption>(options.reflection));
  SetTransport(options, builder);
  impl->connections = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
      grpc::InsecureServerCredentials());
  builder.RegisterService(&impl->prefill);
  builder.RegisterService(&impl->attention);
  builder.RegisterService(&impl->source);
  builder.RegisterService(&impl->health);
  builder.RegisterCallbackGenericService(&impl->unknown);
  impl->SetServing(false);
  impl->health.Set(kLivenessService, true);
  impl->server = builder.BuildAndStart();
  if (impl->server == nullptr) {
    return absl::UnavailableError("the gRPC library did not start a server");
  }
  impl->channelz_id = NewestServer();
  impl->WatchUnread();
  impl->Accept(std::move(listener), parts);
  return std::unique_ptr<GrpcServer>(new GrpcServer(std::move(impl)));
}

GrpcServer::GrpcServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

GrpcServer::~GrpcServer() { Shutdown(absl::ZeroDuration()); }

int GrpcServer::port() const { return impl_->port; }

void GrpcServer::SetModels(std::vector<const ServedModel*> models) {
  impl_->context.SetModels(std::move(models));
}

bool GrpcServer::IsIdle() { return impl_->context.open_calls.none(); }

void GrpcServer::SetServing(bool serving) { impl_->SetServing(serving); }

void GrpcServer::Drain(absl::AnyInvocable<void()> on_uploaded) {
  impl_->context.Drain(std::move(on_uploaded));
}

int32_t GrpcServer::CutUploads() {
  impl_->context.SetStopping();
  return impl_->context.uploads.Cut(
      absl::UnavailableError("the server is shutting down"));
}

// A reply whose last bytes are on their way is lost if its connection closes while the
// peer still sends: the system then resets it. So the peers first get what was sent,
// and then the time to answer gRPC's goodbye, behind which no byte is left.
void GrpcServer::Shutdown(absl::Duration grace) {
  constexpr absl::Duration kGoodbyeMax = absl::Seconds(1);
  if (impl_->acceptor == nullptr) return;  // was shut down
  const absl::Time until = absl::Now() + grace;
  impl_->health.EndWatches();
  impl_->context.open_calls.WaitForNone(grace);
  impl_->context.SetStopping();
  impl_->acceptor->Stop();
  impl_->acceptor->AwaitAcknowledged(until);
  const absl::Time now = absl::Now();
  impl_->server->Shutdown(absl::ToChronoTime(
      now + std::clamp(until - now, absl::ZeroDuration(), kGoodbyeMax)));
  impl_->acceptor.reset();
}

}  // namespace pbs::server
