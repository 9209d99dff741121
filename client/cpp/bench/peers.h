// The programs that a run compares the server with.
//
// Threading: call StartPeers() before this process has threads.
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "client/cpp/bench/flight_peer.h"
#include "client/cpp/bench/options.h"
#include "client/cpp/bench/protobuf_peer.h"
#include "client/cpp/bench/tcp_peer.h"

namespace pbs::bench {

// Null: not compared.
struct Peers {
  std::unique_ptr<TcpPeer> tcp;
  std::unique_ptr<ProtobufPeer> protobuf;
  std::unique_ptr<FlightPeer> flight;

  // The process of the peer with this label; nullopt for the server itself.
  std::optional<pid_t> pid(const std::string& label) const;
};

absl::StatusOr<Peers> StartPeers(const BenchOptions& options);

}  // namespace pbs::bench
