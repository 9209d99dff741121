// Options of pbs-bench transfer.
//
// Threading: plain values and a pure function.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace pbs::bench {

inline constexpr int32_t kStreamsMax = 16;

struct BenchOptions {
  std::string server = "127.0.0.1:50051";
  std::string model;  // empty: the server's only model
  int64_t server_pid = 0;
  std::string direction = "both";  // upload, download
  std::vector<int32_t> streams = {1, 2};
  std::string checksums = "both";            // on, off
  std::vector<std::string> peers = {"tcp"};  // tcp, protobuf, flight, none
  std::string flight;                        // command of the Flight peer
  int32_t mib = 256;                         // of one transfer
  int32_t rounds = 15;
  int32_t chunk_bytes = 1 << 20;
  int32_t stream_window_bytes = 4 << 20;
  std::string shared_memory_socket;  // of the server; "": not measured

  bool uploads() const { return direction != "download"; }
  bool downloads() const { return direction != "upload"; }
  bool compares(const std::string& peer) const {
    return std::find(peers.begin(), peers.end(), peer) != peers.end();
  }
};

// InvalidArgument with flag, value and limit.
absl::Status Validate(const BenchOptions& options);

}  // namespace pbs::bench
