// One run of the benchmark. It prepares and verifies everything once. Then every kind
// of transfer runs once per round, in turn, so that a drift of the machine's speed
// affects all kinds alike.
//
// Threading: one thread. Memory: two blocks of --mib here, one in the TCP peer, and at
// the server one cache and one upload.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/bench/measure.h"
#include "client/cpp/bench/options.h"
#include "client/cpp/bench/peers.h"
#include "client/cpp/bench/transfer.h"
#include "pbs/v1/prefill.pb.h"

namespace pbs::bench {

// A kind of transfer and its samples, one per round.
struct Cell {
  TransferLabel label;
  int64_t bytes = 0;  // of one transfer
  std::vector<Sample> samples;
};

struct SessionResult {
  v1::ServerInfo server;
  std::optional<v1::KvDescriptor> kv;  // of the cache that was fetched
  std::vector<Cell> cells;
};

// Calls `say` with short messages of progress.
absl::StatusOr<SessionResult> RunSession(
    const BenchOptions& options, const Peers& peers,
    const std::function<void(const std::string&)>& say);

}  // namespace pbs::bench
