#include "server/telemetry/metrics_server.h"

#include <prometheus/collectable.h>
#include <prometheus/exposer.h>

#include <exception>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace pbs::server {
namespace {

// The exposer takes numeric addresses only.
std::string NumericAddress(const std::string& listen) {
  constexpr char kLocalhost[] = "localhost:";
  if (!absl::StartsWith(listen, kLocalhost)) return listen;
  return absl::StrCat("127.0.0.1:", listen.substr(sizeof(kLocalhost) - 1));
}

}  // namespace

MetricsServer::MetricsServer(
    std::unique_ptr<prometheus::Exposer> exposer,
    std::vector<std::shared_ptr<prometheus::Collectable>> sources)
    : sources_(std::move(sources)),
      exposer_(std::move(exposer)),
      port_(exposer_->GetListeningPorts().front()) {
  for (const auto& source : sources_) exposer_->RegisterCollectable(source);
}

MetricsServer::~MetricsServer() = default;

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Create(
    const std::string& listen,
    std::vector<std::shared_ptr<prometheus::Collectable>> sources) {
  std::unique_ptr<prometheus::Exposer> exposer;
  try {
    exposer = std::make_unique<prometheus::Exposer>(NumericAddress(listen));
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("metrics_listen ", listen, " cannot be bound: ", error.what()));
  }
  if (exposer->GetListeningPorts().empty()) {
    return absl::UnavailableError(
        absl::StrCat("metrics_listen ", listen, " has no listening port"));
  }
  return std::unique_ptr<MetricsServer>(
      new MetricsServer(std::move(exposer), std::move(sources)));
}

}  // namespace pbs::server
