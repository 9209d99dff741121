// Transfers of the same bytes over raw TCP.
//
// Threading: as Transfer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "client/cpp/bench/tcp_peer.h"
#include "client/cpp/bench/transfer.h"

namespace pbs::bench {

using TcpConnections = std::vector<TcpConnection>;

// Stream i moves parts[i] over connections[i]; there are as many streams as parts. The
// connections and the memory of the parts must outlive the transfer.
std::unique_ptr<Transfer> MakeTcpUpload(TcpConnections& connections,
                                        std::vector<std::span<const std::byte>> parts,
                                        int32_t chunk_bytes);
std::unique_ptr<Transfer> MakeTcpDownload(TcpConnections& connections,
                                          std::vector<std::span<std::byte>> parts,
                                          int32_t chunk_bytes);

// Sends `bytes` to the peer and back. DataLoss when they come back changed.
absl::Status VerifyTcp(TcpConnection& connection, std::span<const std::byte> bytes,
                       int32_t chunk_bytes);

}  // namespace pbs::bench
