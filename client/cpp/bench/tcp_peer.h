// The raw TCP peer: a process that receives into memory and sends from memory over
// loopback, with recv() and send() only. The bytes are copied once, by the kernel.
//
// Threading: call Start() before this process has threads. A TcpConnection belongs to
// one thread at a time, in each process.
// Memory: the peer holds `memory_bytes` resident bytes per connection.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "absl/status/statusor.h"
#include "client/cpp/bench/child_process.h"

namespace pbs::bench {

class TcpConnection {
 public:
  explicit TcpConnection(int fd) : fd_(fd) {}
  TcpConnection(TcpConnection&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~TcpConnection();

  // Sends `bytes` in chunks to the start of the peer's memory; returns when the peer
  // has received them.
  absl::Status Upload(std::span<const std::byte> bytes, size_t chunk_bytes);
  // Fills `bytes` from the start of the peer's memory.
  absl::Status Download(std::span<std::byte> bytes, size_t chunk_bytes);

 private:
  friend class TcpPeer;
  int fd_;
};

class TcpPeer {
 public:
  static absl::StatusOr<std::unique_ptr<TcpPeer>> Start();

  pid_t pid() const { return process_->pid(); }
  // `memory_bytes`: the longest transfer of this connection.
  absl::StatusOr<TcpConnection> Connect(int64_t memory_bytes) const;

 private:
  TcpPeer(std::unique_ptr<ChildProcess> process, uint16_t port)
      : process_(std::move(process)), port_(port) {}

  const std::unique_ptr<ChildProcess> process_;
  const uint16_t port_;
};

}  // namespace pbs::bench
