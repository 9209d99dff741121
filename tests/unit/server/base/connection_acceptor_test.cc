// Spec: server/base/connection_acceptor.h.
#include "server/base/connection_acceptor.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "server/base/descriptors.h"
#include "tests/support/tcp_socket.h"

namespace pbs::server {
namespace {

using testing_support::ConnectTo;
using testing_support::ReadAll;

// Keeps what it is given.
class Keeper {
 public:
  explicit Keeper(int32_t connections_max)
      : acceptor_(
            *Listen("listen", "127.0.0.1:0"), {.connections_max = connections_max},
            [this](FileDescriptor connection, int) {
              const std::lock_guard lock(mutex_);
              kept_.push_back(std::move(connection));
              changed_.notify_all();
            },
            [this](int64_t refused) {
              const std::lock_guard lock(mutex_);
              said_.push_back(refused);
            }) {}

  FileDescriptor Connect() const { return ConnectTo("127.0.0.1", acceptor_.port()); }
  FileDescriptor WaitForOne() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !kept_.empty(); });
    FileDescriptor first = std::move(kept_.front());
    kept_.pop_front();
    return first;
  }
  ConnectionAcceptor& acceptor() { return acceptor_; }
  std::vector<int64_t> said() {
    const std::lock_guard lock(mutex_);
    return said_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<FileDescriptor> kept_;
  std::vector<int64_t> said_;
  ConnectionAcceptor acceptor_;  // last: it calls the above
};

TEST(ConnectionAcceptorSpec, HandsOnWhatConnects) {
  Keeper keeper(2);
  const FileDescriptor ours = keeper.Connect();
  FileDescriptor theirs = keeper.WaitForOne();
  EXPECT_EQ(send(theirs.get(), "hello", 5, 0), 5);
  theirs.Close();
  EXPECT_EQ(ReadAll(ours), "hello");
}

TEST(ConnectionAcceptorSpec, GivesUpWhatNobodyAcknowledges) {
  Keeper keeper(2);
  const FileDescriptor ours = keeper.Connect();
  const FileDescriptor theirs = keeper.WaitForOne();
  unsigned millis = 0;
  socklen_t size = sizeof(millis);
  ASSERT_EQ(getsockopt(theirs.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, &millis, &size), 0);
  EXPECT_EQ(millis, 20'000u);
}

TEST(ConnectionAcceptorSpec, ClosesWhatIsBeyondTheLimitAndSaysSoOnce) {
  Keeper keeper(1);
  const FileDescriptor first = keeper.Connect();
  const FileDescriptor kept = keeper.WaitForOne();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(ReadAll(keeper.Connect()), "");
  EXPECT_EQ(keeper.said(), std::vector<int64_t>{1});
}

TEST(ConnectionAcceptorSpec, AConnectionThatClosedMakesRoomForAnother) {
  Keeper keeper(1);
  for (int i = 0; i < 3; ++i) {
    const FileDescriptor ours = keeper.Connect();
    FileDescriptor theirs = keeper.WaitForOne();
    theirs.Close();
  }
  EXPECT_TRUE(keeper.said().empty());
}

// The number of a closed connection may be used again for something else.
TEST(ConnectionAcceptorSpec, AnotherFileWithTheNumberOfAConnectionDoesNotCount) {
  Keeper keeper(1);
  const FileDescriptor first = keeper.Connect();
  FileDescriptor theirs = keeper.WaitForOne();
  const FileDescriptor other(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_GE(dup3(other.get(), theirs.get(), O_CLOEXEC), 0);
  const FileDescriptor second = keeper.Connect();
  EXPECT_TRUE(keeper.WaitForOne().is_open());
}

TEST(ConnectionAcceptorSpec, WaitsUntilPeersHaveWhatWasSent) {
  Keeper keeper(2);
  const FileDescriptor ours = keeper.Connect();
  FileDescriptor theirs = keeper.WaitForOne();
  keeper.acceptor().Stop();
  // As much as the kernel takes: the peer's buffer is full, and this end's.
  const std::string bytes(1 << 20, 'x');
  size_t sent = 0;
  while (true) {
    const ssize_t count = send(theirs.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (count < 0) break;
    sent += static_cast<size_t>(count);
  }
  EXPECT_FALSE(keeper.acceptor().AwaitAcknowledged(absl::Now()));
  size_t received = 0;
  std::string buffer(1 << 20, '\0');
  while (received < sent) {
    const ssize_t count = recv(ours.get(), buffer.data(), buffer.size(), 0);
    ASSERT_GT(count, 0);
    received += static_cast<size_t>(count);
  }
  EXPECT_TRUE(keeper.acceptor().AwaitAcknowledged(absl::Now() + absl::Seconds(30)));
}

TEST(ConnectionAcceptorSpec, DoesNotWaitForAConnectionThatClosed) {
  Keeper keeper(2);
  const FileDescriptor ours = keeper.Connect();
  FileDescriptor theirs = keeper.WaitForOne();
  keeper.acceptor().Stop();
  theirs.Close();
  EXPECT_TRUE(keeper.acceptor().AwaitAcknowledged(absl::Now()));
}

[[noreturn]] void RunOutOfDescriptorsAndRecover() {
  Keeper keeper(100);
  const FileDescriptor ours(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in peer = {};
  {
    const FileDescriptor first = keeper.Connect();
    const FileDescriptor theirs = keeper.WaitForOne();
    socklen_t size = sizeof(peer);
    getpeername(first.get(), reinterpret_cast<sockaddr*>(&peer), &size);
  }
  rlimit usual = {};
  getrlimit(RLIMIT_NOFILE, &usual);
  FileDescriptor lowest_free(dup(ours.get()));
  rlimit all_used = usual;
  all_used.rlim_cur = static_cast<rlim_t>(lowest_free.get());
  lowest_free.Close();
  setrlimit(RLIMIT_NOFILE, &all_used);
  if (connect(ours.get(), reinterpret_cast<sockaddr*>(&peer), sizeof(peer)) != 0) {
    std::_Exit(3);
  }
  if (!ReadAll(ours).empty() || keeper.said().empty()) std::_Exit(4);  // refused
  setrlimit(RLIMIT_NOFILE, &usual);
  const FileDescriptor second = keeper.Connect();
  std::_Exit(keeper.WaitForOne().is_open() ? 0 : 5);
}

TEST(ConnectionAcceptorSpec, AcceptsAgainWhenThereAreDescriptorsAgain) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(RunOutOfDescriptorsAndRecover(), testing::ExitedWithCode(0), "");
}

TEST(ConnectionAcceptorSpec, EndsWithConnectionsThatNobodyTook) {
  FileDescriptor ours;
  {
    Keeper keeper(1);
    ours = keeper.Connect();
  }
  EXPECT_EQ(ReadAll(ours), "");
}

[[noreturn]] void RaiseTheDescriptorLimit() {
  const rlimit low = {64, 128};
  setrlimit(RLIMIT_NOFILE, &low);
  if (RaiseDescriptorLimit(32) != 64) std::_Exit(3);    // never lowers
  if (RaiseDescriptorLimit(100) != 100) std::_Exit(4);  // as asked
  if (RaiseDescriptorLimit(500) != 128) std::_Exit(5);  // as far as it goes
  rlimit found = {};
  getrlimit(RLIMIT_NOFILE, &found);
  std::_Exit(found.rlim_cur == 128 ? 0 : 6);
}

TEST(DescriptorsSpec, TheSoftLimitIsRaisedUpToTheHardOne) {
  EXPECT_EXIT(RaiseTheDescriptorLimit(), testing::ExitedWithCode(0), "");
}

TEST(DescriptorsSpec, OpenOnesAreCounted) {
  const int64_t before = OpenDescriptors();
  const FileDescriptor one(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(OpenDescriptors(), before + 1);
}

}  // namespace
}  // namespace pbs::server
