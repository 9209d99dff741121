// Arrow Flight as a peer: a program, flight_peer.py, that is both server and client.
//
// Threading: call Start() before this process has threads; transfers as Transfer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "client/cpp/bench/child_process.h"
#include "client/cpp/bench/transfer.h"

namespace pbs::bench {

class FlightPeer {
 public:
  // `command`: words with spaces between them, "python3 flight_peer.py". Unavailable
  // when it does not start.
  static absl::StatusOr<std::unique_ptr<FlightPeer>> Start(const std::string& command);

  pid_t pid() const { return server_; }
  // Transfers of `bytes` in chunks. The program keeps the received batches; nothing is
  // copied out of them.
  absl::StatusOr<std::unique_ptr<Transfer>> MakeDownload(int64_t bytes, int32_t streams,
                                                         int32_t chunk_bytes);

 private:
  FlightPeer(std::unique_ptr<LineProcess> client, pid_t server)
      : client_(std::move(client)), server_(server) {}

  const std::unique_ptr<LineProcess> client_;
  const pid_t server_;
};

}  // namespace pbs::bench
