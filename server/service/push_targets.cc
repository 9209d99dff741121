#include "server/service/push_targets.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

constexpr int kMillis = 1000;
// The limit that counts for pings in later versions of gRPC than we are built with.
constexpr char kPingTimeoutArgument[] = "grpc.http2.ping_timeout_ms";
constexpr int kAckBytesMax = 4 << 10;
// A target that refused a connection is tried again after at most this time.
constexpr int kBackoffMillisMin = 100;
constexpr int kBackoffMillisMax = 1000;
// Of one attempt to connect. Less than kPushConnectMax, so that gRPC says what failed.
constexpr absl::Duration kAttemptMax = absl::Seconds(4);

grpc::ChannelArguments ArgumentsOf(const TransportOptions& transport) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, transport.keepalive_seconds * kMillis);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                   transport.keepalive_timeout_seconds * kMillis);
  arguments.SetInt(kPingTimeoutArgument, transport.keepalive_timeout_seconds * kMillis);
  // A long prefill is silent, but a connection without pushes needs no pings.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 0);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kBackoffMillisMin);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kBackoffMillisMax);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
                   static_cast<int>(absl::ToInt64Milliseconds(kAttemptMax)));
  // Calls go to the address of the configuration: by no proxy of the environment, and
  // with no settings from DNS. What was sent is not kept to be sent again.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetMaxReceiveMessageSize(kAckBytesMax);
  return arguments;
}

}  // namespace

PushTargets::PushTargets(const std::vector<std::string>& targets,
                         const TransportOptions& transport)
    : transport_(transport) {
  MutexLock lock(mutex_);
  for (const std::string& target : targets) channels_.emplace(target, nullptr);
}

std::shared_ptr<grpc::Channel> PushTargets::ChannelTo(const std::string& target) {
  MutexLock lock(mutex_);
  const auto found = channels_.find(target);
  PBS_CHECK(found != channels_.end());  // the request was checked
  if (found->second == nullptr) {
    // With the scheme: a host may have the name of another scheme, such as unix.
    found->second = grpc::CreateCustomChannel(absl::StrCat("dns:///", target),
                                              grpc::InsecureChannelCredentials(),
                                              ArgumentsOf(transport_));
  }
  return found->second;
}

}  // namespace pbs::server
