// ConnectionAcceptor: accepts TCP connections and hands them on, up to a number of
// them, and goes on whatever a single accept answers.
//
// A connection beyond the limit, or one for which the process has no descriptor, is
// closed at once: its peer learns that it should go elsewhere. As soon as others have
// closed, connections are accepted again.
//
// Threading: a thread of its own, which calls `take` and `on_full`; destroy it from
// another one. Memory: 16 bytes per open connection.
#pragma once

#include <cstdint>
#include <functional>
#include <thread>

#include "absl/time/time.h"
#include "server/base/file_descriptor.h"
#include "server/base/listener.h"

namespace pbs::server {

struct AcceptorOptions {
  int32_t connections_max = 1;
  // What was sent and not acknowledged for so long ends a connection.
  absl::Duration unacknowledged_max = absl::Seconds(20);
};

class ConnectionAcceptor {
 public:
  // Owns the connection from then on, and closes it.
  using Take = std::function<void(FileDescriptor connection, int listener)>;
  // Connections are being refused; `refused` so far. Once per minute at most.
  using OnFull = std::function<void(int64_t refused)>;

  ConnectionAcceptor(Listener listener, const AcceptorOptions& options, Take take,
                     OnFull on_full);
  // Accepts no more and closes the sockets; `take` is called no more.
  ~ConnectionAcceptor();
  ConnectionAcceptor(const ConnectionAcceptor&) = delete;
  ConnectionAcceptor& operator=(const ConnectionAcceptor&) = delete;

  int32_t port() const { return listener_.port; }

 private:
  class OpenConnections;

  void Run();
  // Accepts what waits at `listener`; false when the process or the system has run out
  // of something, and a pause is due.
  bool AcceptAll(int listener, OpenConnections& open);
  void RefuseOne(int listener);
  void CountRefusal();

  const Listener listener_;
  const AcceptorOptions options_;
  const Take take_;
  const OnFull on_full_;
  FileDescriptor spare_;  // given up to accept and close one when there is no other
  int64_t refused_ = 0;
  absl::Time said_ = absl::InfinitePast();
  FileDescriptor stop_;  // an eventfd that the destructor writes
  std::thread thread_;   // last: it uses all of the above
};

}  // namespace pbs::server
