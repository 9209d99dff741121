#include "client/cpp/bench/peers.h"

#include <optional>
#include <string>
#include <utility>

namespace pbs::bench {

std::optional<pid_t> Peers::pid(const std::string& label) const {
  if (label == "tcp") return tcp->pid();
  if (label == "protobuf") return protobuf->pid();
  if (label == "flight") return flight->pid();
  return std::nullopt;
}

absl::StatusOr<Peers> StartPeers(const BenchOptions& options) {
  Peers peers;
  if (options.compares("tcp")) {
    auto started = TcpPeer::Start();
    if (!started.ok()) return started.status();
    peers.tcp = *std::move(started);
  }
  if (options.compares("flight")) {
    auto started = FlightPeer::Start(options.flight);
    if (!started.ok()) return started.status();
    peers.flight = *std::move(started);
  }
  if (options.compares("protobuf")) {
    auto started = ProtobufPeer::Start();
    if (!started.ok()) return started.status();
    peers.protobuf = *std::move(started);
  }
  return peers;
}

}  // namespace pbs::bench
