#include "client/cpp/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <optional>

#include "absl/strings/str_cat.h"
#include "proto/wire/region_handover.h"

namespace pbs::client {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// Closes itself; -1 is none.
struct Descriptor {
  explicit Descriptor(int descriptor) : number(descriptor) {}
  ~Descriptor() {
    if (number >= 0) close(number);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int number;
};

absl::Status NoAnswer(const std::string& path, absl::string_view why) {
  return absl::UnavailableError(absl::StrCat(
      "no server gives shared memory at ", path, ": ", why,
      "; start pbs-prefilld on this host and as this user, with shared_memory_socket"));
}

absl::Status Connect(const std::string& path, absl::Duration timeout, int socket) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "shared_memory_socket has ", path.size(), " bytes of path, outside [1, ",
        sizeof(address.sun_path) - 1, "]"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const timeval time =
      absl::ToTimeval(std::max(timeout, absl::Milliseconds(1)));  // 0 is for ever
  if (setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time)) != 0 ||
      setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time)) != 0 ||
      connect(socket, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) !=
          0) {
    return NoAnswer(path, std::strerror(errno));
  }
  return absl::OkStatus();
}

struct Reply {
  wire::RegionReply record;
  int descriptor = -1;
};

// Every descriptor that came with a message; all but the first are closed.
int TakeDescriptor(msghdr& message) {
  int first = -1;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(header) + i * sizeof(int), sizeof(number));
      if (first < 0) {
        first = number;
      } else {
        close(number);
      }
    }
  }
  return first;
}

absl::StatusOr<Reply> Receive(const std::string& path, int socket) {
  std::array<std::byte, wire::kRegionReplyBytes> record;
  iovec part = {record.data(), record.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t count = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
  if (count < 0) return NoAnswer(path, std::strerror(errno));
  if (count == 0) return NoAnswer(path, "the connection was closed");
  Reply reply;
  reply.descriptor = TakeDescriptor(message);
  const auto decoded = wire::DecodeRegionReply(
      std::span<const std::byte>(record).first(static_cast<size_t>(count)));
  if (!decoded.has_value()) {
    if (reply.descriptor >= 0) close(reply.descriptor);
    return absl::DataLossError(
        absl::StrCat("what answers at ", path, " is not a pbs-prefilld"));
  }
  reply.record = *decoded;
  return reply;
}

absl::Status Refusal(const std::string& path, uint32_t code) {
  const auto reason = static_cast<absl::StatusCode>(code);
  if (reason == absl::StatusCode::kNotFound) {
    return absl::NotFoundError(absl::StrCat(
        "no lease has this ticket at ", path,
        ": it is unknown, expired or released, or another server holds it"));
  }
  return {reason, absl::StrCat("the server at ", path, " gives no shared memory: ",
                               absl::StatusCodeToString(reason))};
}

// A region that could shrink would fault, and one of another size is another cache's.
absl::Status CheckRegion(const std::string& path, int descriptor, uint64_t stated,
                         int64_t bytes) {
  struct stat info = {};
  const int seals = fcntl(descriptor, F_GET_SEALS);
  if (fstat(descriptor, &info) != 0 || seals < 0 || (seals & kSeals) != kSeals) {
    return absl::DataLossError(absl::StrCat("the shared memory from ", path,
                                            " is not sealed against other sizes"));
  }
  if (info.st_size != bytes || stated != static_cast<uint64_t>(bytes)) {
    return absl::DataLossError(absl::StrCat("the shared memory from ", path, " has ",
                                            info.st_size, " bytes and is said to have ",
                                            stated, "; the cache has ", bytes));
  }
  return absl::OkStatus();
}

}  // namespace

MappedRegion::~MappedRegion() {
  munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

absl::StatusOr<std::shared_ptr<const MappedRegion>> MapRegion(
    const std::string& socket_path, const v1::KvTicket& ticket, int64_t bytes,
    absl::Duration timeout) {
  const auto request =
      wire::EncodeRegionRequest({.handle = ticket.handle(), .epoch = ticket.epoch()});
  if (!request.has_value()) {  // no lease has such a handle
    return Refusal(socket_path, static_cast<uint32_t>(absl::StatusCode::kNotFound));
  }
  const Descriptor socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.number < 0) return NoAnswer(socket_path, std::strerror(errno));
  if (absl::Status status = Connect(socket_path, timeout, socket.number);
      !status.ok()) {
    return status;
  }
  // It fails where the server has refused already: then the reply says why.
  (void)send(socket.number, request->data(), request->size(), MSG_NOSIGNAL);
  const absl::StatusOr<Reply> reply = Receive(socket_path, socket.number);
  if (!reply.ok()) return reply.status();
  const Descriptor file(reply->descriptor);
  if (reply->record.code != 0) return Refusal(socket_path, reply->record.code);
  if (absl::Status right =
          CheckRegion(socket_path, file.number, reply->record.bytes, bytes);
      !right.ok()) {
    return right;
  }
  const auto size = static_cast<size_t>(bytes);
  void* const data = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.number, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot map ", bytes, " bytes of the shared memory from ",
                     socket_path, ": ", std::strerror(errno)));
  }
  madvise(data, size, MADV_HUGEPAGE);  // advice only
  return std::make_shared<const MappedRegion>(
      std::span<const std::byte>(static_cast<const std::byte*>(data), size));
}

SharedRegions::Entry SharedRegions::Take(const v1::KvTicket& ticket) {
  const auto found =
      std::find_if(entries_.begin(), entries_.end(), [&](const Entry& entry) {
        return entry.handle == ticket.handle() && entry.epoch == ticket.epoch();
      });
  if (found == entries_.end()) return {};
  Entry entry = std::move(*found);
  entries_.erase(found);
  return entry;
}

absl::StatusOr<std::shared_ptr<const MappedRegion>> SharedRegions::Get(
    const v1::KvTicket& ticket, int64_t bytes, absl::Duration timeout) {
  {
    absl::MutexLock lock(&mutex_);
    if (Entry entry = Take(ticket); entry.region != nullptr) {
      std::shared_ptr<const MappedRegion> region = entry.region;
      entries_.push_front(std::move(entry));
      if (static_cast<int64_t>(region->bytes().size()) == bytes) return region;
    }
  }
  auto region = MapRegion(socket_path_, ticket, bytes, timeout);
  if (!region.ok()) return region;
  Entry replaced, oldest;  // unmapped after the lock is released
  absl::MutexLock lock(&mutex_);
  replaced = Take(ticket);
  entries_.push_front({ticket.handle(), ticket.epoch(), *region});
  if (entries_.size() > kRegionsMax) {
    oldest = std::move(entries_.back());
    entries_.pop_back();
  }
  return region;
}

void SharedRegions::Drop(const v1::KvTicket& ticket) {
  Entry dropped;  // unmapped after the lock is released
  absl::MutexLock lock(&mutex_);
  dropped = Take(ticket);
}

}  // namespace pbs::client
