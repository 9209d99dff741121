// Spec: client/cpp/shared_region.h: a client believes no server.
#include "client/cpp/shared_region.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "proto/wire/region_handover.h"
#include "tests/support/case_name.h"

namespace pbs::client {
namespace {

constexpr int64_t kBytes = 5000;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

// What a server sends.
struct Script {
  wire::RegionReply reply = {0, kBytes};
  bool sends_descriptor = true;
  int64_t size = kBytes;
  int seals = kSeals;
  // Of the record
  std::function<void(std::vector<std::byte>&)> change = [](auto&) {};
};

// Answers `connections` times, each with a region that is all 0x5A.
class FakeServer {
 public:
  FakeServer(const Script& script, int connections)
      : script_(script), listener_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    std::string name = testing::TempDir() + "/pbs-fake-XXXXXX";
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    path_ = name + "/socket";
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof(address)),
              0);
    EXPECT_EQ(listen(listener_, 8), 0);
    thread_ = std::thread([this, connections] {
      for (int i = 0; i < connections; ++i) Answer();
    });
  }
  ~FakeServer() {
    thread_.join();
    close(listener_);
    std::filesystem::remove_all(folder_);
  }
  FakeServer(const FakeServer&) = delete;
  FakeServer& operator=(const FakeServer&) = delete;

  const std::string& path() const { return path_; }

 private:
  void Answer() {
    const int peer = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    std::array<std::byte, wire::kRegionRequestBytes> request;
    EXPECT_EQ(recv(peer, request.data(), request.size(), MSG_WAITALL),
              static_cast<ssize_t>(request.size()));
    EXPECT_TRUE(wire::DecodeRegionRequest(request).has_value());
    const int region = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    EXPECT_EQ(ftruncate(region, script_.size), 0);
    const std::vector<char> bytes(static_cast<size_t>(script_.size), 0x5A);
    EXPECT_EQ(write(region, bytes.data(), bytes.size()),
              static_cast<ssize_t>(bytes.size()));
    EXPECT_EQ(fcntl(region, F_ADD_SEALS, script_.seals), 0);
    Send(peer, region);
    close(region);
    close(peer);
  }
  void Send(int peer, int region) const {
    const auto encoded = wire::EncodeRegionReply(script_.reply);
    std::vector<std::byte> record(encoded.begin(), encoded.end());
    script_.change(record);
    if (record.empty()) return;
    iovec part = {record.data(), record.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (script_.sends_descriptor) {
      message.msg_control = control.data();
      message.msg_controllen = control.size();
      cmsghdr* const header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(header), &region, sizeof(region));
    }
    EXPECT_GT(sendmsg(peer, &message, MSG_NOSIGNAL), 0);
  }

  const Script script_;
  const int listener_;
  std::string folder_, path_;
  std::thread thread_;
};

v1::KvTicket Ticket(char digit = 'a') {
  v1::KvTicket ticket;
  ticket.set_handle(std::string(32, digit));
  ticket.set_epoch(9);
  return ticket;
}

constexpr absl::Duration kTimeout = absl::Seconds(20);

TEST(MapRegionSpec, GivesTheBytesOfASealedRegion) {
  const FakeServer server({}, 1);
  const auto region = MapRegion(server.path(), Ticket(), kBytes, kTimeout);
  ASSERT_TRUE(region.ok()) << region.status();
  ASSERT_EQ((*region)->bytes().size(), static_cast<size_t>(kBytes));
  EXPECT_EQ((*region)->bytes().front(), std::byte{0x5A});
  EXPECT_EQ((*region)->bytes().back(), std::byte{0x5A});
}

TEST(MapRegionSpec, NobodyAtThePathIsUnavailableAndNamesThePath) {
  const absl::Status status =
      MapRegion("/nowhere/socket", Ticket(), kBytes, kTimeout).status();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_NE(status.message().find("no server gives shared memory at /nowhere/socket"),
            std::string::npos)
      << status;
}

TEST(MapRegionSpec, APathThatNoSocketCanHaveIsRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(
      MapRegion(std::string(108, 'x'), Ticket(), kBytes, kTimeout).status()));
}

TEST(MapRegionSpec, AHandleThatIsNoneIsNotFound) {
  v1::KvTicket ticket = Ticket();
  ticket.set_handle("short");
  EXPECT_TRUE(absl::IsNotFound(
      MapRegion("/nowhere/socket", ticket, kBytes, kTimeout).status()));
}

TEST(SharedRegionsSpec, ATicketIsMappedOnceUntilItIsDropped) {
  const FakeServer server({}, 2);
  SharedRegions regions(server.path());
  const auto first = *regions.Get(Ticket(), kBytes, kTimeout);
  EXPECT_EQ(*regions.Get(Ticket(), kBytes, kTimeout), first);
  regions.Drop(Ticket());
  EXPECT_NE(*regions.Get(Ticket(), kBytes, kTimeout), first);
}

TEST(SharedRegionsSpec, OnlyTheLastTicketsStayMapped) {
  constexpr int kTickets = SharedRegions::kRegionsMax + 1;
  const FakeServer server({}, kTickets + 1);
  SharedRegions regions(server.path());
  std::vector<std::weak_ptr<const MappedRegion>> mapped;
  for (int i = 0; i < kTickets; ++i) {
    mapped.push_back(
        *regions.Get(Ticket(static_cast<char>('a' + i)), kBytes, kTimeout));
  }
  EXPECT_TRUE(mapped.front().expired());
  EXPECT_FALSE(mapped[1].expired());
  EXPECT_TRUE(regions.Get(Ticket('a'), kBytes, kTimeout).ok());
}

struct LiarCase {
  const char* name;
  Script script;
  absl::StatusCode code;
  const char* message;  // a part
};

class LyingServerSpec : public testing::TestWithParam<LiarCase> {};

TEST_P(LyingServerSpec, IsRefused) {
  const FakeServer server(GetParam().script, 1);
  const absl::Status status =
      MapRegion(server.path(), Ticket(), kBytes, kTimeout).status();
  EXPECT_EQ(status.code(), GetParam().code) << status;
  EXPECT_NE(status.message().find(GetParam().message), std::string::npos) << status;
  EXPECT_NE(status.message().find(server.path()), std::string::npos) << status;
}

constexpr auto kLost = absl::StatusCode::kDataLoss;

INSTANTIATE_TEST_SUITE_P(
    Cases, LyingServerSpec,
    testing::Values(
        LiarCase{"region_is_shorter",
                 {.size = kBytes - 1},
                 kLost,
                 "has 4999 bytes and is said to have 5000; the cache has 5000"},
        LiarCase{"region_is_longer", {.size = kBytes + 1}, kLost, "has 5001 bytes"},
        LiarCase{"another_size_is_said",
                 {.reply = {0, kBytes + 1}},
                 kLost,
                 "is said to have 5001"},
        LiarCase{"nothing_is_sealed", {.seals = 0}, kLost, "is not sealed"},
        LiarCase{"it_can_shrink",
                 {.seals = F_SEAL_GROW | F_SEAL_SEAL},
                 kLost,
                 "is not sealed"},
        LiarCase{"it_can_grow",
                 {.seals = F_SEAL_SHRINK | F_SEAL_SEAL},
                 kLost,
                 "is not sealed"},
        LiarCase{"seals_are_open",
                 {.seals = F_SEAL_SHRINK | F_SEAL_GROW},
                 kLost,
                 "is not sealed"},
        LiarCase{"no_descriptor", {.sends_descriptor = false}, kLost, "is not sealed"},
        LiarCase{"no_lease",
                 {.reply = {5, 0}, .sends_descriptor = false},
                 absl::StatusCode::kNotFound,
                 "no lease has this ticket"},
        LiarCase{"refused_with_a_descriptor",
                 {.reply = {7, 0}},
                 absl::StatusCode::kPermissionDenied,
                 "PERMISSION_DENIED"},
        LiarCase{"garbage",
                 {.change = [](auto& r) { r.assign(r.size(), std::byte{'x'}); }},
                 kLost,
                 "is not a pbs-prefilld"},
        LiarCase{"truncated",
                 {.change = [](auto& r) { r.pop_back(); }},
                 kLost,
                 "is not a pbs-prefilld"},
        LiarCase{"closed",
                 {.change = [](auto& r) { r.clear(); }},
                 absl::StatusCode::kUnavailable,
                 "the connection was closed"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::client
