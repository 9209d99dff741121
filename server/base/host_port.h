// Addresses to listen on: host:port.
//
// Threading: stateless.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pbs::server {

struct HostPort {
  std::string host;  // without the brackets of an IPv6 address
  int32_t port = 0;  // 0 .. 65535; 0: the system picks one

  // "host:port", an IPv6 address in brackets; ParseHostPort() reads it back.
  std::string ToString() const;
  // Reachable from this machine only.
  bool IsLoopback() const;
  // "0.0.0.0" or "::": every address of this machine.
  bool IsEveryAddress() const;
};

// IPv4, or IPv6 without brackets.
bool IsIpAddress(const std::string& text);

// "127.0.0.1:50051", "localhost:0", "[::1]:50051", "prefill-0.example:50051". The
// message of InvalidArgument does not name the field; the caller adds it.
absl::StatusOr<HostPort> ParseHostPort(absl::string_view text);

}  // namespace pbs::server
