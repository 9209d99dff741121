// MetricsServer: GET and HEAD of /metrics on a port of its own.
//
// Connections do not wait for each other. A connection that sends nothing takes a
// descriptor until it is closed after kMetricsIdleSecondsMax.
//
// Threading: Create and destroy from one thread; scrapes run on one thread of its own
// per address. Memory: a page per scrape, a few KiB per connection.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace prometheus {
class Collectable;
}  // namespace prometheus

namespace pbs::server {

inline constexpr unsigned kMetricsConnectionsMax = 32;  // of each address
inline constexpr unsigned kMetricsIdleSecondsMax = 5;

class MetricsServer {
 public:
  // `listen` is host:port; port 0 picks a free one. Serves `sources`. shared_ptr: the
  // code that counts shares the registry. When the address cannot be bound, Unavailable
  // names it and the reason.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Create(
      const std::string& listen,
      std::vector<std::shared_ptr<prometheus::Collectable>> sources);
  ~MetricsServer();
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;

  int32_t port() const { return port_; }

 private:
  struct Daemons;
  MetricsServer(std::unique_ptr<Daemons> daemons, int32_t port);

  const std::unique_ptr<Daemons> daemons_;
  const int32_t port_;
};

}  // namespace pbs::server
