#include "client/cpp/bench/tcp_peer.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/bench/page_buffer.h"

namespace pbs::bench {
namespace {

enum class Command : uint64_t { kUpload, kDownload };

struct Request {
  Command command;
  uint64_t bytes;
  uint64_t chunk_bytes;
};

absl::Status SystemError(const char* what) {
  return absl::UnavailableError(
      absl::StrCat("raw TCP peer: ", what, ": ", std::strerror(errno)));
}

bool SendAll(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(sent));
  }
  return true;
}

bool ReceiveAll(int fd, std::span<std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t received = recv(fd, bytes.data(), bytes.size(), MSG_WAITALL);
    if (received < 0 && errno == EINTR) continue;
    if (received <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(received));
  }
  return true;
}

// Calls move(part) for every chunk of `bytes`, in order.
template <class Byte, class Move>
bool ForEachChunk(std::span<Byte> bytes, size_t chunk_bytes, Move&& move) {
  for (size_t offset = 0; offset < bytes.size(); offset += chunk_bytes) {
    const size_t size = std::min(chunk_bytes, bytes.size() - offset);
    if (!move(bytes.subspan(offset, size))) return false;
  }
  return true;
}

template <class T>
bool SendValue(int fd, const T& value) {
  return SendAll(fd, std::as_bytes(std::span(&value, 1)));
}
template <class T>
bool ReceiveValue(int fd, T& value) {
  return ReceiveAll(fd, std::as_writable_bytes(std::span(&value, 1)));
}

void NoDelay(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

// ---- the peer's side

bool Serve(int fd, std::span<std::byte> memory) {
  Request request;
  if (!ReceiveValue(fd, request) || request.bytes > memory.size()) return false;
  const auto bytes = memory.first(request.bytes);
  if (request.command == Command::kDownload) {
    return ForEachChunk(bytes, request.chunk_bytes,
                        [fd](auto chunk) { return SendAll(fd, chunk); });
  }
  return ForEachChunk(bytes, request.chunk_bytes,
                      [fd](auto chunk) { return ReceiveAll(fd, chunk); }) &&
         SendValue(fd, char{1});
}

void ServeConnection(int fd) {
  NoDelay(fd);
  int64_t memory_bytes = 0;
  if (ReceiveValue(fd, memory_bytes)) {
    const auto memory = PageBuffer::Allocate(memory_bytes);
    if (memory.ok() && SendValue(fd, char{1})) {
      while (Serve(fd, memory->span())) {
      }
    }
  }
  close(fd);
}

[[noreturn]] void RunPeer(int listener) {
  while (true) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0 && errno == EINTR) continue;
    if (fd < 0) _exit(1);
    std::thread([fd] { ServeConnection(fd); }).detach();
  }
}

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

}  // namespace

// ---- ours

TcpConnection::~TcpConnection() {
  if (fd_ >= 0) close(fd_);
}

absl::Status TcpConnection::Upload(std::span<const std::byte> bytes,
                                   size_t chunk_bytes) {
  char done;
  if (SendValue(fd_, Request{.command = Command::kUpload,
                             .bytes = bytes.size(),
                             .chunk_bytes = chunk_bytes}) &&
      ForEachChunk(bytes, chunk_bytes,
                   [this](auto chunk) { return SendAll(fd_, chunk); }) &&
      ReceiveValue(fd_, done)) {
    return absl::OkStatus();
  }
  return SystemError("upload");
}

absl::Status TcpConnection::Download(std::span<std::byte> bytes, size_t chunk_bytes) {
  if (SendValue(fd_, Request{.command = Command::kDownload,
                             .bytes = bytes.size(),
                             .chunk_bytes = chunk_bytes}) &&
      ForEachChunk(bytes, chunk_bytes,
                   [this](auto chunk) { return ReceiveAll(fd_, chunk); })) {
    return absl::OkStatus();
  }
  return SystemError("download");
}

absl::StatusOr<std::unique_ptr<TcpPeer>> TcpPeer::Start() {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listener < 0) return SystemError("socket");
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  const bool listens = bind(listener, generic, size) == 0 &&
                       listen(listener, SOMAXCONN) == 0 &&
                       getsockname(listener, generic, &size) == 0;
  const absl::Status failure = listens ? absl::OkStatus() : SystemError("listen");
  auto process = listens ? ChildProcess::Fork([listener] { RunPeer(listener); })
                         : absl::StatusOr<std::unique_ptr<ChildProcess>>(failure);
  close(listener);
  if (!process.ok()) return process.status();
  return std::unique_ptr<TcpPeer>(
      new TcpPeer(*std::move(process), ntohs(address.sin_port)));
}

absl::StatusOr<TcpConnection> TcpPeer::Connect(int64_t memory_bytes) const {
  TcpConnection connection(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int fd = connection.fd_;
  const sockaddr_in address = Loopback(port_);
  char ready;
  if (fd < 0 ||
      connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return SystemError("connect");
  }
  NoDelay(fd);
  if (!SendValue(fd, memory_bytes) || !ReceiveValue(fd, ready)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the raw TCP peer cannot allocate ", memory_bytes, " bytes"));
  }
  return connection;
}

}  // namespace pbs::bench
