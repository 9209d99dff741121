#include "server/telemetry/metrics_server.h"

#include <microhttpd.h>
#include <prometheus/collectable.h>
#include <prometheus/text_serializer.h>

#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/listener.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

using Sources = std::vector<std::shared_ptr<prometheus::Collectable>>;

constexpr char kPath[] = "/metrics";
constexpr char kTextType[] = "text/plain; version=0.0.4; charset=utf-8";

std::string PageOf(const Sources& sources) {
  std::vector<prometheus::MetricFamily> families;
  for (const auto& source : sources) {
    for (prometheus::MetricFamily& family : source->Collect()) {
      families.push_back(std::move(family));
    }
  }
  return prometheus::TextSerializer().Serialize(families);
}

MHD_Result Reply(MHD_Connection* connection, unsigned code, std::string_view body) {
  MHD_Response* response = MHD_create_response_from_buffer(
      body.size(), const_cast<char*>(body.data()), MHD_RESPMEM_MUST_COPY);
  if (response == nullptr) return MHD_NO;  // closes the connection
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, kTextType);
  if (code == MHD_HTTP_METHOD_NOT_ALLOWED) {
    MHD_add_response_header(response, MHD_HTTP_HEADER_ALLOW, "GET, HEAD");
  }
  const MHD_Result queued = MHD_queue_response(connection, code, response);
  MHD_destroy_response(response);
  return queued;
}

// The library calls it once for the header and again at the end of the request.
MHD_Result Answer(void* sources, MHD_Connection* connection, const char* path,
                  const char* method, const char*, const char*, size_t* upload_bytes,
                  void** seen) {
  if (*seen == nullptr) {
    *seen = sources;
    return MHD_YES;
  }
  if (*upload_bytes > 0) {
    *upload_bytes = 0;  // a body means nothing here
    return MHD_YES;
  }
  if (std::strcmp(path, kPath) != 0) {
    return Reply(connection, MHD_HTTP_NOT_FOUND, "the metrics are at /metrics\n");
  }
  if (std::strcmp(method, MHD_HTTP_METHOD_GET) != 0 &&
      std::strcmp(method, MHD_HTTP_METHOD_HEAD) != 0) {
    return Reply(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "use GET or HEAD\n");
  }
  return Reply(connection, MHD_HTTP_OK, PageOf(*static_cast<const Sources*>(sources)));
}

// The log is ours: a peer's broken request is no news.
void SayNothing(void*, const char*, std::va_list) {}

}  // namespace

struct MetricsServer::Daemons {
  explicit Daemons(Sources served) : sources(std::move(served)) {}
  ~Daemons() {
    for (MHD_Daemon* daemon : running) MHD_stop_daemon(daemon);
  }

  absl::Status Start(FileDescriptor socket) {
    MHD_Daemon* daemon = MHD_start_daemon(
        MHD_USE_AUTO_INTERNAL_THREAD | MHD_USE_ERROR_LOG, 0, nullptr, nullptr, Answer,
        const_cast<Sources*>(&sources), MHD_OPTION_EXTERNAL_LOGGER, SayNothing, nullptr,
        MHD_OPTION_LISTEN_SOCKET, static_cast<MHD_socket>(socket.get()),
        MHD_OPTION_CONNECTION_LIMIT, kMetricsConnectionsMax,
        MHD_OPTION_CONNECTION_TIMEOUT, kMetricsIdleSecondsMax, MHD_OPTION_END);
    if (daemon == nullptr) {
      return absl::UnavailableError(
          "metrics_listen: the system refused a thread or memory for it; raise the "
          "limits (ulimit -u, ulimit -v)");
    }
    socket.Release();  // the daemon closes it
    running.push_back(daemon);
    return absl::OkStatus();
  }

  const Sources sources;
  std::vector<MHD_Daemon*> running;
};

MetricsServer::MetricsServer(std::unique_ptr<Daemons> daemons, int32_t port)
    : daemons_(std::move(daemons)), port_(port) {}

MetricsServer::~MetricsServer() = default;

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Create(
    const std::string& listen,
    std::vector<std::shared_ptr<prometheus::Collectable>> sources) {
  PBS_ABSL_ASSIGN_OR_RETURN(Listener listener, Listen("metrics_listen", listen));
  auto daemons = std::make_unique<Daemons>(std::move(sources));
  for (FileDescriptor& socket : listener.sockets) {
    PBS_ABSL_RETURN_IF_ERROR(daemons->Start(std::move(socket)));
  }
  return std::unique_ptr<MetricsServer>(
      new MetricsServer(std::move(daemons), listener.port));
}

}  // namespace pbs::server
