// Sockets that listen for TCP connections.
//
// Threading: values and stateless functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/base/file_descriptor.h"

namespace pbs::server {

struct Listener {
  // At least one; a name may stand for several addresses. They do not block.
  std::vector<FileDescriptor> sockets;
  int32_t port = 0;
};

// Listens on `address`, host:port. Port 0 picks one that is free. "0.0.0.0" and "[::]"
// both stand for every address of this machine, IPv4 and IPv6.
//
// Errors: Unavailable "FIELD ADDRESS cannot be bound: " with the reason and what to do.
absl::StatusOr<Listener> Listen(absl::string_view field, const std::string& address);

}  // namespace pbs::server
