// MetricsServer: GET /metrics on a port of its own.
//
// Threading: Create and destroy from one thread; scrapes run on two threads of its own.
// Destruction may take two seconds.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace prometheus {
class Collectable;
class Exposer;
}  // namespace prometheus

namespace pbs::server {

class MetricsServer {
 public:
  // `listen` is host:port; the host a numeric address or "localhost", port 0 picks a
  // free one. Serves `sources`. shared_ptr: the exposer's interface asks for it.
  // Unavailable when the address cannot be bound, naming it.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Create(
      const std::string& listen,
      std::vector<std::shared_ptr<prometheus::Collectable>> sources);
  ~MetricsServer();

  int port() const { return port_; }

 private:
  MetricsServer(std::unique_ptr<prometheus::Exposer> exposer,
                std::vector<std::shared_ptr<prometheus::Collectable>> sources);

  const std::vector<std::shared_ptr<prometheus::Collectable>> sources_;
  const std::unique_ptr<prometheus::Exposer> exposer_;
  const int port_;
};

}  // namespace pbs::server
