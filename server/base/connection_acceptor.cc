#include "server/base/connection_acceptor.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "pbs/check.h"

namespace pbs::server {
namespace {

// When accept() fails for want of something: until somebody else gives it back.
constexpr int kPauseMillis = 50;
constexpr absl::Duration kSayInterval = absl::Minutes(1);
// Between two looks at what is not acknowledged; the kernel does not wake for it.
constexpr absl::Duration kLookInterval = absl::Milliseconds(2);

FileDescriptor OpenSpare() {
  return FileDescriptor(open("/dev/null", O_RDONLY | O_CLOEXEC));
}

void Tune(int connection, absl::Duration unacknowledged_max) {
  const int on = 1;
  const auto millis = static_cast<unsigned>(ToInt64Milliseconds(unacknowledged_max));
  setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(connection, IPPROTO_TCP, TCP_USER_TIMEOUT, &millis, sizeof(millis));
}

}  // namespace

// The connections that were handed on. Their owner does not say when it closes one: it
// is open as long as its number still is the socket that it was.
class ConnectionAcceptor::OpenConnections {
 public:
  explicit OpenConnections(int32_t connections_max)
      : connections_max_(static_cast<size_t>(connections_max)) {}

  // Looks only when the limit is reached.
  bool HasRoom() {
    if (open_.size() < connections_max_) return true;
    std::erase_if(
        open_, [](const Entry& entry) { return InodeOf(entry.number) != entry.inode; });
    return open_.size() < connections_max_;
  }
  void Add(int number) { open_.push_back({number, InodeOf(number)}); }

  bool AllAcknowledged() const {
    return std::none_of(open_.begin(), open_.end(), [](const Entry& entry) {
      int bytes = 0;
      return InodeOf(entry.number) == entry.inode &&
             ioctl(entry.number, SIOCOUTQ, &bytes) == 0 && bytes > 0;
    });
  }

 private:
  struct Entry {
    int number;
    ino_t inode;
  };
  // 0 for a number that is closed.
  static ino_t InodeOf(int number) {
    struct stat info = {};
    return fstat(number, &info) == 0 ? info.st_ino : 0;
  }

  const size_t connections_max_;
  std::vector<Entry> open_;
};

ConnectionAcceptor::ConnectionAcceptor(Listener listener,
                                       const AcceptorOptions& options, Take take,
                                       OnFull on_full)
    : listener_(std::move(listener)),
      options_(options),
      take_(std::move(take)),
      on_full_(std::move(on_full)),
      open_(std::make_unique<OpenConnections>(options.connections_max)),
      spare_(OpenSpare()),
      stop_(eventfd(0, EFD_CLOEXEC)) {
  PBS_CHECK(stop_.is_open());
  thread_ = std::thread([this] { Run(); });
}

ConnectionAcceptor::~ConnectionAcceptor() { Stop(); }

void ConnectionAcceptor::Stop() {
  if (!thread_.joinable()) return;
  eventfd_write(stop_.get(), 1);
  thread_.join();
}

bool ConnectionAcceptor::AwaitAcknowledged(absl::Time until) const {
  while (!open_->AllAcknowledged()) {
    if (absl::Now() >= until) return false;
    absl::SleepFor(kLookInterval);
  }
  return true;
}

void ConnectionAcceptor::Run() {
  std::vector<pollfd> waits = {{stop_.get(), POLLIN, 0}};
  for (const FileDescriptor& socket : listener_.sockets) {
    waits.push_back({socket.get(), POLLIN, 0});
  }
  while (true) {
    if (poll(waits.data(), waits.size(), -1) < 0) continue;  // interrupted
    if (waits.front().revents != 0) return;
    bool pause = false;
    for (size_t i = 1; i < waits.size(); ++i) {
      if (waits[i].revents != 0) pause |= !AcceptAll(waits[i].fd);
    }
    if (pause) poll(waits.data(), 1, kPauseMillis);
  }
}

bool ConnectionAcceptor::AcceptAll(int listener) {
  while (true) {
    FileDescriptor connection(
        accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (connection.is_open()) {
      if (!open_->HasRoom()) {
        CountRefusal();
        continue;
      }
      Tune(connection.get(), options_.unacknowledged_max);
      open_->Add(connection.get());
      take_(std::move(connection), listener);
      continue;
    }
    switch (errno) {
      case EAGAIN:
        return true;
      case EMFILE:
      case ENFILE:
        RefuseOne(listener);
        return false;
      case EINTR:
      case ECONNABORTED:
        continue;
      default:
        return false;
    }
  }
}

void ConnectionAcceptor::RefuseOne(int listener) {
  spare_.Close();
  FileDescriptor refused(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (refused.is_open()) CountRefusal();
  refused.Close();
  spare_ = OpenSpare();
}

void ConnectionAcceptor::CountRefusal() {
  ++refused_;
  const absl::Time now = absl::Now();
  if (now - said_ < kSayInterval) return;
  said_ = now;
  on_full_(refused_);
}

}  // namespace pbs::server
