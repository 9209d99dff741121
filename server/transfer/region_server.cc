#include "server/transfer/region_server.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "pbs/check.h"
#include "server/base/shared_region.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

using std::chrono::steady_clock;

// When accept() fails for want of something: until somebody else gives one back.
constexpr int kPauseMillis = 50;

std::optional<uid_t> UserOf(const FileDescriptor& socket) {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    return std::nullopt;
  }
  return peer.uid;
}

// Sends a record, and `region` with it if that is open. The record fits the buffer of a
// socket to which nothing was sent.
bool SendReply(const FileDescriptor& socket, const wire::RegionReply& reply,
               const FileDescriptor& region) {
  auto record = wire::EncodeRegionReply(reply);
  iovec part = {record.data(), record.size()};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  if (region.is_open()) {
    const int number = region.get();
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &number, sizeof(number));
  }
  return sendmsg(socket.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) ==
         static_cast<ssize_t>(record.size());
}

}  // namespace

absl::StatusOr<std::unique_ptr<RegionServer>> RegionServer::Create(
    const RegionServerOptions& options, LeaseStore& leases, KvMetrics& metrics) {
  PBS_ABSL_ASSIGN_OR_RETURN(std::unique_ptr<UnixListener> listener,
                            UnixListener::Create("shared_memory_socket", options.path));
  return std::unique_ptr<RegionServer>(
      new RegionServer(options, leases, metrics, std::move(listener)));
}

RegionServer::RegionServer(const RegionServerOptions& options, LeaseStore& leases,
                           KvMetrics& metrics, std::unique_ptr<UnixListener> listener)
    : options_(options),
      leases_(leases),
      metrics_(metrics),
      listener_(std::move(listener)),
      stop_(eventfd(0, EFD_CLOEXEC)) {
  PBS_CHECK(stop_.is_open());
  thread_ = std::thread([this] { Run(); });
}

RegionServer::~RegionServer() {
  eventfd_write(stop_.get(), 1);
  thread_.join();
}

void RegionServer::Run() {
  std::vector<pollfd> waits;
  while (true) {
    const bool has_room =
        static_cast<int32_t>(connections_.size()) < options_.connections_max;
    const short wanted = has_room ? POLLIN : 0;  // NOLINT(google-runtime-int): poll's
    waits.assign({{stop_.get(), POLLIN, 0}, {listener_->get(), wanted, 0}});
    for (const Connection& connection : connections_) {
      waits.push_back({connection.socket.get(), POLLIN, 0});
    }
    if (poll(waits.data(), waits.size(), PollMillis()) < 0) continue;  // interrupted
    if (waits[0].revents != 0) return;
    for (size_t i = connections_.size(); i > 0; --i) {
      if (waits[i + 1].revents == 0 || !Serve(connections_[i - 1])) continue;
      connections_.erase(connections_.begin() + static_cast<ptrdiff_t>(i - 1));
    }
    EndLate();
    if (waits[1].revents != 0) Accept();
  }
}

int RegionServer::PollMillis() const {
  if (connections_.empty()) return -1;
  Time first = connections_.front().until;
  for (const Connection& connection : connections_) {
    first = std::min(first, connection.until);
  }
  const auto left =
      std::chrono::ceil<std::chrono::milliseconds>(first - steady_clock::now());
  return static_cast<int>(std::max<int64_t>(0, left.count()));
}

void RegionServer::Accept() {
  FileDescriptor socket(
      accept4(listener_->get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!socket.is_open()) {
    if (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED) return;
    pollfd stop = {stop_.get(), POLLIN, 0};
    poll(&stop, 1, kPauseMillis);
    return;
  }
  if (UserOf(socket) != options_.uid) {
    Reply(socket, RegionResult::kForeign,
          {.code = static_cast<uint32_t>(absl::StatusCode::kPermissionDenied)});
    return;
  }
  connections_.push_back(
      {std::move(socket),
       steady_clock::now() + absl::ToChronoNanoseconds(options_.request_time_max)});
}

void RegionServer::EndLate() {
  const Time now = steady_clock::now();
  std::erase_if(connections_, [&](const Connection& connection) {
    if (connection.until > now) return false;
    metrics_.RegionRequests(RegionResult::kTimeout).Increment();
    return true;
  });
}

bool RegionServer::Serve(Connection& connection) {
  const std::span<std::byte> rest =
      std::span(connection.request).subspan(connection.received);
  const ssize_t count = recv(connection.socket.get(), rest.data(), rest.size(), 0);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (count < 0) {
    metrics_.RegionRequests(RegionResult::kError).Increment();
    return true;
  }
  connection.received += static_cast<size_t>(count);
  if (count > 0 && connection.received < wire::kRegionRequestBytes) return false;
  const auto request = wire::DecodeRegionRequest(
      std::span(connection.request).first(connection.received));
  if (!request.has_value()) {
    metrics_.RegionRequests(RegionResult::kBadRequest).Increment();
    return true;
  }
  Answer(connection.socket, *request);
  return true;
}

void RegionServer::Answer(const FileDescriptor& socket,
                          const wire::RegionRequest& request) {
  v1::KvTicket ticket;
  ticket.set_handle(request.handle);
  ticket.set_epoch(request.epoch);
  const absl::StatusOr<LeaseView> lease = leases_.Find(ticket);
  if (!lease.ok()) {
    Reply(socket, RegionResult::kNotFound,
          {.code = static_cast<uint32_t>(lease.status().code())});
    return;
  }
  const SharedRegion* const region = lease->kv->region();
  PBS_CHECK(region != nullptr);
  const absl::StatusOr<FileDescriptor> file = region->OpenReadOnly();
  if (!file.ok()) {
    Reply(socket, RegionResult::kError,
          {.code = static_cast<uint32_t>(file.status().code())});
    return;
  }
  Reply(socket, RegionResult::kOk, {.code = 0, .bytes = region->bytes().size()}, *file);
}

void RegionServer::Reply(const FileDescriptor& socket, RegionResult result,
                         const wire::RegionReply& reply, const FileDescriptor& region) {
  const bool sent = SendReply(socket, reply, region);
  metrics_.RegionRequests(sent ? result : RegionResult::kError).Increment();
}

}  // namespace pbs::server
