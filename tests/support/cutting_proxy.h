// A TCP relay that cuts connections, like a broken network between client and server.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace pbs::testing_support {

class CuttingProxy {
 public:
  // Relays 127.0.0.1:port() to 127.0.0.1:`server_port`, one connection at a time.
  // Connection i is cut once the server has sent cuts[i] bytes through it; connections
  // after the last entry are not cut.
  CuttingProxy(int server_port, std::vector<int64_t> cuts)
      : server_port_(server_port), cuts_(std::move(cuts)) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = Loopback(0);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)),
              0);
    EXPECT_EQ(listen(listener_, 8), 0);
    socklen_t length = sizeof(address);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Serve(); });
  }
  ~CuttingProxy() {
    stop_ = true;
    shutdown(listener_, SHUT_RDWR);
    thread_.join();
    close(listener_);
  }
  CuttingProxy(const CuttingProxy&) = delete;
  CuttingProxy& operator=(const CuttingProxy&) = delete;

  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  int connections() const { return connections_; }

 private:
  static sockaddr_in Loopback(int port) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    return address;
  }

  void Serve() {
    for (int client; (client = accept(listener_, nullptr, nullptr)) >= 0;) {
      const auto index = static_cast<size_t>(connections_++);
      const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      const sockaddr_in address = Loopback(server_port_);
      if (connect(server, reinterpret_cast<const sockaddr*>(&address),
                  sizeof(address)) == 0) {
        Relay(client, server, index < cuts_.size() ? cuts_[index] : INT64_MAX);
      }
      close(server);
      close(client);
    }
  }

  // Relays until one end closes, `allowed` bytes have come from the server, or the
  // proxy stops.
  void Relay(int client, int server, int64_t allowed) {
    std::vector<char> bytes(64 << 10);
    pollfd ends[] = {{client, POLLIN, 0}, {server, POLLIN, 0}};
    while (!stop_ && allowed > 0) {
      if (poll(ends, 2, /*timeout_ms=*/20) < 0) return;
      for (int from = 0; from < 2; ++from) {
        if (ends[from].revents == 0) continue;
        ssize_t count = recv(ends[from].fd, bytes.data(), bytes.size(), 0);
        if (count <= 0) return;
        if (from == 1) count = std::min<ssize_t>(count, allowed);
        if (from == 1) allowed -= count;
        for (ssize_t sent = 0; sent < count;) {
          const ssize_t step = send(ends[1 - from].fd, bytes.data() + sent,
                                    static_cast<size_t>(count - sent), MSG_NOSIGNAL);
          if (step <= 0) return;
          sent += step;
        }
      }
    }
  }

  const int server_port_;
  const std::vector<int64_t> cuts_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stop_ = false;
  std::atomic<int> connections_ = 0;
  std::thread thread_;
};

}  // namespace pbs::testing_support
