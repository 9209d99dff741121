// Raw TCP connections for tests.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "server/base/file_descriptor.h"

namespace pbs::testing_support {

// A connection to "127.0.0.1" or "::1"; none when no process listens there.
inline server::FileDescriptor ConnectTo(const char* host, int32_t port) {
  const auto wire_port = htons(static_cast<uint16_t>(port));
  sockaddr_in v4 = {};
  sockaddr_in6 v6 = {};
  const sockaddr* address = reinterpret_cast<sockaddr*>(&v4);
  socklen_t size = sizeof(v4);
  if (inet_pton(AF_INET, host, &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = wire_port;
  } else {
    EXPECT_EQ(inet_pton(AF_INET6, host, &v6.sin6_addr), 1) << host;
    v6.sin6_family = AF_INET6;
    v6.sin6_port = wire_port;
    address = reinterpret_cast<sockaddr*>(&v6);
    size = sizeof(v6);
  }
  server::FileDescriptor made(
      socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(made.get(), address, size) != 0) made.Close();
  return made;
}

// Reads all bytes that the peer sends until it closes.
inline std::string ReadAll(const server::FileDescriptor& connection) {
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = recv(connection.get(), buffer, sizeof(buffer), 0)) > 0;) {
    text.append(buffer, static_cast<size_t>(n));
  }
  return text;
}

inline bool HasIpv6() {
  server::FileDescriptor made(socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in6 address = {};
  address.sin6_family = AF_INET6;
  address.sin6_addr = in6addr_loopback;
  return made.is_open() &&
         bind(made.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
}

}  // namespace pbs::testing_support
