#include "server/base/listener.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/host_port.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

constexpr int kBacklog = 1024;  // connections that nobody has accepted yet
constexpr int32_t kUnprivilegedPortUsual = 1024;

struct FreeAddresses {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using AddressList = std::unique_ptr<addrinfo, FreeAddresses>;

int32_t UnprivilegedPortMin() {
  int32_t port = kUnprivilegedPortUsual;
  std::ifstream("/proc/sys/net/ipv4/ip_unprivileged_port_start") >> port;
  return port;
}

std::string ReasonOf(int error, int32_t port) {
  switch (error) {
    case EADDRINUSE:
      return absl::StrCat("another process has port ", port,
                          "; choose another port, or stop that process (ss -ltnp "
                          "names it)");
    case EACCES:
      return absl::StrCat("this user may not take ports below ", UnprivilegedPortMin(),
                          "; choose a higher port, or give the process "
                          "CAP_NET_BIND_SERVICE");
    case EADDRNOTAVAIL:
      return "this machine does not have the address; choose one of its own (ip addr "
             "lists them)";
    case EAFNOSUPPORT:
      return "this machine has no IPv6; choose an IPv4 address";
    case EMFILE:
      return "the process has no free file descriptor; raise the limit (ulimit -n)";
    default:
      return std::strerror(error);
  }
}

absl::StatusOr<AddressList> Resolve(const HostPort& address) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int error = getaddrinfo(address.host.c_str(),
                                absl::StrCat(address.port).c_str(), &hints, &list);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat("the name has no address (",
                                               gai_strerror(error),
                                               "); choose a numeric address"));
  }
  return AddressList(list);
}

void SetPort(sockaddr_storage& address, int32_t port) {
  const in_port_t wire = htons(static_cast<uint16_t>(port));
  if (address.ss_family == AF_INET6) {
    reinterpret_cast<sockaddr_in6&>(address).sin6_port = wire;
  } else {
    reinterpret_cast<sockaddr_in&>(address).sin_port = wire;
  }
}

int32_t PortOf(const FileDescriptor& socket) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                   : reinterpret_cast<sockaddr_in&>(address).sin_port);
}

// 0, or the error. `both_families`: an IPv6 socket takes IPv4 connections, too.
int Bind(const addrinfo& place, int32_t port, bool both_families, FileDescriptor& out) {
  FileDescriptor made(
      socket(place.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!made.is_open()) return errno;
  const int on = 1;
  const int only_ipv6 = both_families ? 0 : 1;
  sockaddr_storage address = {};
  std::memcpy(&address, place.ai_addr, place.ai_addrlen);
  SetPort(address, port);
  if (setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
      (place.ai_family == AF_INET6 && setsockopt(made.get(), IPPROTO_IPV6, IPV6_V6ONLY,
                                                 &only_ipv6, sizeof(only_ipv6)) != 0) ||
      bind(made.get(), reinterpret_cast<sockaddr*>(&address), place.ai_addrlen) != 0 ||
      listen(made.get(), kBacklog) != 0) {
    return errno;
  }
  out = std::move(made);
  return 0;
}

bool IsOfNoUse(int error) { return error == EAFNOSUPPORT || error == EADDRNOTAVAIL; }

// Listens on every address of `address.host`, on the first one's port. An address of a
// family that this machine does not have counts only when there is no other.
absl::Status ListenOnAll(const HostPort& address, bool both_families, Listener& out) {
  PBS_ABSL_ASSIGN_OR_RETURN(const AddressList list, Resolve(address));
  int failure = 0;
  out.port = address.port;
  for (const addrinfo* place = list.get(); place != nullptr; place = place->ai_next) {
    FileDescriptor socket;
    const int error = Bind(*place, out.port, both_families, socket);
    if (error == 0) {
      out.port = PortOf(socket);
      out.sockets.push_back(std::move(socket));
      continue;
    }
    if (failure == 0 || IsOfNoUse(failure)) failure = error;
    if (!IsOfNoUse(error)) break;
  }
  if (failure == 0 || (!out.sockets.empty() && IsOfNoUse(failure))) {
    return absl::OkStatus();
  }
  return absl::UnavailableError(ReasonOf(failure, out.port));
}

absl::Status ListenOnHost(const HostPort& address, Listener& out) {
  if (address.host != "0.0.0.0" && address.host != "::") {
    return ListenOnAll(address, /*both_families=*/false, out);
  }
  if (ListenOnAll({"::", address.port}, /*both_families=*/true, out).ok()) {
    return absl::OkStatus();
  }
  // Without IPv6, and where it fails for everybody: this says why.
  out.sockets.clear();
  return ListenOnAll({"0.0.0.0", address.port}, /*both_families=*/false, out);
}

}  // namespace

absl::StatusOr<Listener> Listen(absl::string_view field, const std::string& address) {
  Listener listener;
  absl::StatusOr<HostPort> place = ParseHostPort(address);
  const absl::Status status =
      place.ok() ? ListenOnHost(*place, listener) : place.status();
  if (status.ok()) return listener;
  return absl::UnavailableError(
      absl::StrCat(field, " ", address, " cannot be bound: ", status.message()));
}

}  // namespace pbs::server
