// The peer that an ordinary program with gRPC and Protocol Buffers would be: generated
// classes, the payload as a `bytes` field, and every setting of gRPC as it comes.
//
// Threading: call Start() before this process has threads; transfers as Transfer.
// Memory: the peer holds one block as long as the longest transfer of one stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cpp/bench/child_process.h"
#include "client/cpp/bench/transfer.h"

namespace pbs::bench {

class ProtobufPeer {
 public:
  static absl::StatusOr<std::unique_ptr<ProtobufPeer>> Start();

  pid_t pid() const { return process_->pid(); }
  // Stream i fills parts[i] over a connection of its own. The memory must outlive the
  // transfer.
  std::unique_ptr<Transfer> MakeDownload(std::vector<std::span<std::byte>> parts,
                                         int32_t chunk_bytes) const;

 private:
  ProtobufPeer(std::unique_ptr<ChildProcess> process, std::string address)
      : process_(std::move(process)), address_(std::move(address)) {}

  const std::unique_ptr<ChildProcess> process_;
  const std::string address_;
};

}  // namespace pbs::bench
