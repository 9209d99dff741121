// Spec: server/base/unix_listener.h.
#include "server/base/unix_listener.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

namespace pbs::server {
namespace {

namespace fs = std::filesystem;

class UnixListenerSpec : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = testing::TempDir() + "/pbs-unix-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path() const { return folder_ / "socket"; }

  fs::path folder_;
};

bool Connects(const std::string& path) {
  const FileDescriptor peer(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return connect(peer.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) ==
         0;
}

TEST_F(UnixListenerSpec, ListensForTheOwnerOnlyAndRemovesItsFile) {
  auto listener = UnixListener::Create("field", path());
  ASSERT_TRUE(listener.ok()) << listener.status();
  struct stat info = {};
  ASSERT_EQ(stat(path().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, static_cast<mode_t>(S_IFSOCK | 0600));
  EXPECT_TRUE(Connects(path()));
  listener->reset();
  EXPECT_FALSE(fs::exists(path()));
}

TEST_F(UnixListenerSpec, ReplacesTheFileOfAServerThatHasEnded) {
  {
    const FileDescriptor dead(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path().data(), path().size());
    ASSERT_EQ(bind(dead.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)),
              0);
  }
  ASSERT_TRUE(fs::exists(path()));
  const auto listener = UnixListener::Create("field", path());
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_TRUE(Connects(path()));
}

TEST_F(UnixListenerSpec, RefusesTheSocketOfALiveServer) {
  const auto first = UnixListener::Create("field", path());
  ASSERT_TRUE(first.ok()) << first.status();
  const absl::Status second = UnixListener::Create("field", path()).status();
  EXPECT_EQ(second,
            absl::UnavailableError(
                "field " + path() +
                " cannot be bound: another server listens there; choose another "
                "path or stop that server"));
  EXPECT_TRUE(Connects(path()));
}

TEST_F(UnixListenerSpec, LeavesAFileThatIsNoSocket) {
  std::ofstream(path()) << "mine";
  const absl::Status status = UnixListener::Create("field", path()).status();
  EXPECT_EQ(status, absl::UnavailableError("field " + path() +
                                           " cannot be bound: there is a file that is "
                                           "not a socket; remove it or choose another "
                                           "path"));
  EXPECT_EQ(fs::file_size(path()), 4u);
}

TEST_F(UnixListenerSpec, LeavesTheFileThatIsAtItsPathByNow) {
  auto listener = UnixListener::Create("field", path());
  ASSERT_TRUE(listener.ok()) << listener.status();
  fs::remove(path());
  std::ofstream(path()) << "other";
  listener->reset();
  EXPECT_TRUE(fs::exists(path()));
}

TEST_F(UnixListenerSpec, RefusesAPathThatNoSocketCanHave) {
  for (const std::string& bad : {std::string(), std::string(108, 'x')}) {
    const absl::Status status = UnixListener::Create("field", bad).status();
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_NE(status.message().find("are outside [1, 107]"), std::string::npos)
        << status;
  }
  EXPECT_TRUE(absl::IsUnavailable(
      UnixListener::Create("field", folder_ / "none" / "socket").status()));
}

}  // namespace
}  // namespace pbs::server
