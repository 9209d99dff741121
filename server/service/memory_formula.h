// Upper bound of gRPC's memory that the ledger does not charge.
//
// Received: a peer may send `stream_window_bytes` ahead on every stream before we read
// it. (gRPC's probe that widens windows is off: with it, 200 unread streams held 3 GB.)
// A message that is being assembled may grow to its limit. The resource quota bounds
// both over all connections.
//
// Sent: a call makes one message at a time, the next when HTTP/2 has taken the one
// before. A message that points into a held cache or a result takes memory for its
// header only. A message whose payload is copied is charged to the ledger, two chunks
// per call.
//
// Each call also has its own state, ours and gRPC's.
//
//   streams = connections * concurrent_streams_max
//   bytes  <= min(streams * (stream_window_bytes + receive_max), memory_quota_bytes)
//             + streams * kCallStateBytes
//
// Threading: pure functions.
#pragma once

#include <algorithm>
#include <cstdint>

#include "server/service/options.h"

namespace pbs::server {

// A token id takes at most 5 bytes on the wire. All other fields have 64 KiB.
inline constexpr int64_t kTokenWireBytes = 5;
inline constexpr int64_t kReceiveExtraBytes = 64 << 10;
// Call object, arena, header slices: measured below 40 KiB.
inline constexpr int64_t kCallStateBytes = 64 << 10;

// The longest message a peer may send.
constexpr int64_t ReceiveMessageBytesMax(int32_t tokens_max) {
  return std::max<int64_t>(kChunkBytesMax, kTokenWireBytes * tokens_max) +
         kReceiveExtraBytes;
}

constexpr int64_t TransportBytesMax(const TransportOptions& options, int32_t tokens_max,
                                    int64_t connections) {
  const int64_t streams = connections * options.concurrent_streams_max;
  const int64_t received =
      streams * (options.stream_window_bytes + ReceiveMessageBytesMax(tokens_max));
  return std::min(received, options.memory_quota_bytes) + streams * kCallStateBytes;
}

}  // namespace pbs::server
