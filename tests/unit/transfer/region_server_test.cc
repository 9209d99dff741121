// Spec: server/transfer/region_server.h.
#include "server/transfer/region_server.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <prometheus/registry.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "server/base/descriptors.h"
#include "tests/support/case_name.h"
#include "tests/support/kv_fixture.h"

namespace pbs::server {
namespace {

constexpr KvShape kShape = {2, 1, 32, 300, DType::kBF16};
constexpr int kWaitMillis = 20'000;

// What a peer gets: neither of them when the connection is closed.
struct Answer {
  std::optional<wire::RegionReply> record;
  FileDescriptor region;
};

class Peer {
 public:
  explicit Peer(const std::string& path)
      : socket_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    EXPECT_EQ(
        connect(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)),
        0)
        << std::strerror(errno);
  }

  void Send(const std::vector<std::byte>& bytes) const {
    EXPECT_EQ(send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
  }
  void EndRequest() const { shutdown(socket_.get(), SHUT_WR); }
  // True when something, or the end, comes within `millis`.
  bool Waits(int millis) const {
    pollfd wait = {socket_.get(), POLLIN, 0};
    return poll(&wait, 1, millis) == 1;
  }
  Answer Receive() const {
    EXPECT_TRUE(Waits(kWaitMillis)) << "no answer";
    std::array<std::byte, wire::kRegionReplyBytes + 1> record;
    iovec part = {record.data(), record.size()};
    alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control = {};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t count = recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    Answer answer;
    if (count <= 0) return answer;
    answer.record =
        wire::DecodeRegionReply(std::span(record).first(static_cast<size_t>(count)));
    if (const cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr) {
      int number = -1;
      std::memcpy(&number, CMSG_DATA(header), sizeof(number));
      answer.region = FileDescriptor(number);
    }
    return answer;
  }

 private:
  FileDescriptor socket_;
};

class RegionServerSpec : public testing::Test {
 protected:
  RegionServerSpec() {
    std::string name = testing::TempDir() + "/pbs-region-XXXXXX";
    EXPECT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    options_.path = name + "/socket";
  }
  ~RegionServerSpec() override {
    server_.reset();
    std::filesystem::remove_all(folder_);
  }

  void Start() {
    auto server = RegionServer::Create(options_, store_, metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  // A held cache; its prefill runs until Complete().
  PendingLease Run() {
    LeaseRequest request;
    request.model = "m";
    auto begun = store_.Begin(request);
    EXPECT_TRUE(begun.ok()) << begun.status();
    begun->pending.Attach(testing_support::MakeSharedKv(kShape));
    return std::move(begun->pending);
  }
  v1::KvTicket Hold() {
    PendingLease pending = Run();
    EXPECT_TRUE(pending.Complete({}, {}).ok());
    return pending.ticket();
  }
  static std::vector<std::byte> RequestOf(const v1::KvTicket& ticket) {
    const auto record = *wire::EncodeRegionRequest(
        {.handle = ticket.handle(), .epoch = ticket.epoch()});
    return {record.begin(), record.end()};
  }
  Answer Ask(const v1::KvTicket& ticket) const {
    const Peer peer(options_.path);
    peer.Send(RequestOf(ticket));
    return peer.Receive();
  }
  // Counts are made before or just after the peer hears of them.
  void ExpectCounted(RegionResult result, double count) const {
    const auto& counter = metrics_.RegionRequests(result);
    for (int i = 0; i < 1000 && counter.Value() < count; ++i) poll(nullptr, 0, 5);
    EXPECT_EQ(counter.Value(), count);
  }

  ManualClock clock_;
  TimerQueue timers_{clock_};
  prometheus::Registry registry_;
  KvMetrics metrics_{registry_};
  LeaseStore store_{
      {.ttl_seconds_default = 60, .ttl_seconds_max = 600, .leases_max = 300},
      77,
      clock_,
      timers_,
      metrics_};
  std::filesystem::path folder_;
  RegionServerOptions options_;
  std::unique_ptr<RegionServer> server_;
};

TEST_F(RegionServerSpec, ATicketGivesTheMemoryOfItsCache) {
  Start();
  const v1::KvTicket ticket = Hold();
  const Answer answer = Ask(ticket);
  ASSERT_TRUE(answer.record.has_value());
  EXPECT_EQ(answer.record->code, 0u);
  EXPECT_EQ(answer.record->bytes, static_cast<uint64_t>(kShape.bytes()));
  ASSERT_TRUE(answer.region.is_open());
  EXPECT_EQ(fcntl(answer.region.get(), F_GETFL) & O_ACCMODE, O_RDONLY);
  const auto size = static_cast<size_t>(kShape.bytes());
  void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, answer.region.get(), 0);
  ASSERT_NE(data, MAP_FAILED);
  EXPECT_EQ(std::memcmp(data, store_.Find(ticket)->kv->cache().k(0), size), 0);
  munmap(data, size);
  ExpectCounted(RegionResult::kOk, 1);
}

TEST_F(RegionServerSpec, ATicketWorksWhileItsPrefillRuns) {
  Start();
  const PendingLease pending = Run();
  EXPECT_TRUE(Ask(pending.ticket()).region.is_open());
}

TEST_F(RegionServerSpec, TicketsWithoutALeaseAreNotFound) {
  Start();
  v1::KvTicket foreign = Hold();
  foreign.set_epoch(78);
  v1::KvTicket unknown = Hold();
  unknown.set_handle(std::string(32, '0'));
  const v1::KvTicket released = Hold();
  ASSERT_TRUE(store_.Release(released).ok());
  const v1::KvTicket expired = Hold();
  clock_.Advance(absl::Seconds(60));  // the timer has not run
  for (const v1::KvTicket& ticket : {foreign, unknown, released, expired}) {
    const Answer answer = Ask(ticket);
    ASSERT_TRUE(answer.record.has_value());
    EXPECT_EQ(answer.record->code, static_cast<uint32_t>(absl::StatusCode::kNotFound));
    EXPECT_EQ(answer.record->bytes, 0u);
    EXPECT_FALSE(answer.region.is_open());
  }
  ExpectCounted(RegionResult::kNotFound, 4);
}

TEST_F(RegionServerSpec, AProcessOfAnotherUserIsRefused) {
  options_.uid = geteuid() + 1;  // to this server we are another one
  Start();
  const Peer peer(options_.path);
  const Answer answer = peer.Receive();  // before it has said anything
  ASSERT_TRUE(answer.record.has_value());
  EXPECT_EQ(answer.record->code,
            static_cast<uint32_t>(absl::StatusCode::kPermissionDenied));
  EXPECT_FALSE(answer.region.is_open());
  ExpectCounted(RegionResult::kForeign, 1);
}

TEST_F(RegionServerSpec, ARequestMayComeInPieces) {
  Start();
  const std::vector<std::byte> request = RequestOf(Hold());
  const Peer peer(options_.path);
  for (std::byte byte : request) peer.Send({byte});
  EXPECT_TRUE(peer.Receive().region.is_open());
}

TEST_F(RegionServerSpec, WhoSaysNothingIsCutOff) {
  options_.request_time_max = absl::Milliseconds(20);
  Start();
  const Peer silent(options_.path);
  const Peer slow(options_.path);
  slow.Send({std::byte{'P'}});
  EXPECT_FALSE(silent.Receive().record.has_value());
  EXPECT_FALSE(slow.Receive().record.has_value());
  ExpectCounted(RegionResult::kTimeout, 2);
}

TEST_F(RegionServerSpec, FurtherConnectionsWaitUntilOthersEnd) {
  options_.connections_max = 2;
  options_.request_time_max = absl::Seconds(600);
  Start();
  const v1::KvTicket ticket = Hold();
  const Peer first(options_.path);
  const Peer second(options_.path);
  const Peer third(options_.path);
  third.Send(RequestOf(ticket));
  EXPECT_FALSE(third.Waits(50));
  first.Send(RequestOf(ticket));
  EXPECT_TRUE(first.Receive().region.is_open());
  EXPECT_TRUE(third.Receive().region.is_open());
}

TEST_F(RegionServerSpec, ManyRequestsLeaveNoDescriptorsOpen) {
  Start();
  const int64_t before = OpenDescriptors();
  for (int i = 0; i < 200; ++i) {
    const v1::KvTicket ticket = Hold();
    EXPECT_TRUE(Ask(ticket).region.is_open());
    ASSERT_TRUE(store_.Release(ticket).ok());
  }
  // The server closes its end of the last connection after the reply.
  for (int i = 0; i < 1000 && OpenDescriptors() > before; ++i) poll(nullptr, 0, 5);
  EXPECT_LE(OpenDescriptors(), before);
}

TEST_F(RegionServerSpec, ItsEndClosesConnectionsAndRemovesTheSocket) {
  Start();
  const Peer peer(options_.path);
  server_.reset();
  EXPECT_FALSE(peer.Receive().record.has_value());
  EXPECT_FALSE(std::filesystem::exists(options_.path));
}

struct BadRequestCase {
  const char* name;
  std::function<void(std::vector<std::byte>&)> change;
};

class BadRegionRequestSpec : public RegionServerSpec,
                             public testing::WithParamInterface<BadRequestCase> {};

TEST_P(BadRegionRequestSpec, ClosesTheConnectionAndIsCounted) {
  Start();
  std::vector<std::byte> request = RequestOf(Hold());
  GetParam().change(request);
  const Peer peer(options_.path);
  peer.Send(request);
  peer.EndRequest();
  EXPECT_FALSE(peer.Receive().record.has_value());
  ExpectCounted(RegionResult::kBadRequest, 1);
  EXPECT_TRUE(Ask(Hold()).region.is_open());  // others are served
}

INSTANTIATE_TEST_SUITE_P(
    Cases, BadRegionRequestSpec,
    testing::Values(
        BadRequestCase{"empty", [](auto& r) { r.clear(); }},
        BadRequestCase{"truncated", [](auto& r) { r.pop_back(); }},
        BadRequestCase{"one_byte_too_long", [](auto& r) { r.push_back(std::byte{0}); }},
        BadRequestCase{"much_too_long", [](auto& r) { r.resize(64 << 10); }},
        BadRequestCase{"other_magic", [](auto& r) { r[0] = std::byte{'X'}; }},
        BadRequestCase{"other_version", [](auto& r) { r[4] = std::byte{2}; }},
        BadRequestCase{"handle_of_other_digits",
                       [](auto& r) { r[8] = std::byte{'/'}; }},
        BadRequestCase{"zeros", [](auto& r) { r.assign(r.size(), std::byte{0}); }}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
