// RegionServer: gives the shared memory of a held cache to processes of the same user
// on the same host.
//
// A peer connects to the Unix socket, sends one request (proto/wire/region_handover.h)
// and gets one reply; with OK a descriptor that is open for reading. Tickets mean what
// they mean to LeaseStore::Find(). A connection ends after its reply, when its request
// is not one, and when the request is not whole after request_time_max. Further
// connections wait while connections_max are open.
//
// Threading: one thread of its own. Memory: about 100 bytes and a descriptor per
// connection.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/wire/region_handover.h"
#include "server/base/file_descriptor.h"
#include "server/base/unix_listener.h"
#include "server/telemetry/server_metrics.h"
#include "server/transfer/lease_store.h"

namespace pbs::server {

struct RegionServerOptions {
  std::string path;  // of the socket
  int32_t connections_max = 64;
  absl::Duration request_time_max = absl::Seconds(2);
  uid_t uid = geteuid();  // of the peers
};

class RegionServer {
 public:
  // As UnixListener::Create() for the field shared_memory_socket. `leases` and
  // `metrics` must outlive the server.
  static absl::StatusOr<std::unique_ptr<RegionServer>> Create(
      const RegionServerOptions& options, LeaseStore& leases, KvMetrics& metrics);
  // Closes all connections and removes the socket.
  ~RegionServer();
  RegionServer(const RegionServer&) = delete;
  RegionServer& operator=(const RegionServer&) = delete;

 private:
  using Time = std::chrono::steady_clock::time_point;
  struct Connection {
    FileDescriptor socket;
    Time until;
    size_t received = 0;
    // One byte more, to see that a request is too long
    std::array<std::byte, wire::kRegionRequestBytes + 1> request = {};
  };

  RegionServer(const RegionServerOptions& options, LeaseStore& leases,
               KvMetrics& metrics, std::unique_ptr<UnixListener> listener);
  void Run();
  // Until the next connection must end; -1 when there is none.
  int PollMillis() const;
  void Accept();
  // True when the connection is over.
  bool Serve(Connection& connection);
  void EndLate();
  void Answer(const FileDescriptor& socket, const wire::RegionRequest& request);
  void Reply(const FileDescriptor& socket, RegionResult result,
             const wire::RegionReply& reply, const FileDescriptor& region = {});

  const RegionServerOptions options_;
  LeaseStore& leases_;
  KvMetrics& metrics_;
  const std::unique_ptr<UnixListener> listener_;
  const FileDescriptor stop_;            // an eventfd that the destructor writes
  std::vector<Connection> connections_;  // of `thread_`
  std::thread thread_;                   // last: it uses all of the above
};

}  // namespace pbs::server
