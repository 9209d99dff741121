// ConnectionAcceptor: accepts a bounded number of TCP connections and passes them on.
// It continues after any error of a single accept.
//
// A connection beyond the limit, or one for which the process has no descriptor, is
// closed at once, so that its peer can try another server. It accepts again as soon as
// other connections have closed.
//
// Threading: one thread of its own, which calls `take` and `on_full`. Stop and destroy
// it from another thread. Memory: 16 bytes per open connection.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "absl/time/time.h"
#include "server/base/file_descriptor.h"
#include "server/base/listener.h"

namespace pbs::server {

struct AcceptorOptions {
  int32_t connections_max = 1;
  // A connection ends when sent bytes stay unacknowledged for this long.
  absl::Duration unacknowledged_max = absl::Seconds(20);
};

class ConnectionAcceptor {
 public:
  // Takes ownership of the connection and closes it.
  using Take = std::function<void(FileDescriptor connection, int listener)>;
  // Reports, at most once per minute, that connections are refused: `refused` in all.
  using OnFull = std::function<void(int64_t refused)>;

  ConnectionAcceptor(Listener listener, const AcceptorOptions& options, Take take,
                     OnFull on_full);
  // Calls Stop() and closes the sockets.
  ~ConnectionAcceptor();
  ConnectionAcceptor(const ConnectionAcceptor&) = delete;
  ConnectionAcceptor& operator=(const ConnectionAcceptor&) = delete;

  int32_t port() const { return listener_.port; }

  // Stops accepting. `take` is not called afterwards.
  void Stop();
  // After Stop(): waits until the peers have acknowledged all bytes that were sent on
  // connections that are still open. False when they have not by `until`.
  bool AwaitAcknowledged(absl::Time until) const;

 private:
  class OpenConnections;

  void Run();
  // Accepts all waiting connections of `listener`; false when the process or the system
  // is out of a resource, so that a pause is due.
  bool AcceptAll(int listener);
  void RefuseOne(int listener);
  void CountRefusal();

  const Listener listener_;
  const AcceptorOptions options_;
  const Take take_;
  const OnFull on_full_;
  // Of `thread_` until Stop()
  const std::unique_ptr<OpenConnections> open_;
  // Closed to accept and close a connection when no descriptor is free
  FileDescriptor spare_;
  int64_t refused_ = 0;
  absl::Time said_ = absl::InfinitePast();
  FileDescriptor stop_;  // an eventfd that Stop() writes
  std::thread thread_;   // last: it uses all of the above
};

}  // namespace pbs::server
