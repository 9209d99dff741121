// Spec: server/base/listener.h.
#include "server/base/listener.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "tests/support/case_name.h"
#include "tests/support/tcp_socket.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;
using testing_support::ConnectTo;
using testing_support::HasIpv6;

struct AddressCase {
  const char* name;
  const char* address;
  bool ipv4;  // who reaches it from this machine
  bool ipv6;
};

class ListenerSpec : public testing::TestWithParam<AddressCase> {};

TEST_P(ListenerSpec, IsReachedByTheFamiliesOfItsAddress) {
  const AddressCase& c = GetParam();
  if (c.ipv6 && !c.ipv4 && !HasIpv6()) GTEST_SKIP() << "this machine has no IPv6";
  const auto listener = Listen("listen", c.address);
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_GT(listener->port, 0);
  EXPECT_EQ(ConnectTo("127.0.0.1", listener->port).is_open(), c.ipv4);
  if (HasIpv6()) {
    EXPECT_EQ(ConnectTo("::1", listener->port).is_open(), c.ipv6);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Addresses, ListenerSpec,
    testing::Values(AddressCase{"ipv4", "127.0.0.1:0", true, false},
                    AddressCase{"ipv6", "[::1]:0", false, true},
                    AddressCase{"any_ipv4", "0.0.0.0:0", true, true},
                    AddressCase{"any_ipv6", "[::]:0", true, true}),
    testing_support::CaseName());

TEST(ListenerSpec, ANameIsResolved) {
  const auto listener = Listen("listen", "localhost:0");
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_TRUE(ConnectTo("127.0.0.1", listener->port).is_open());
}

TEST(ListenerSpec, APortThatWasLeftAMomentAgoIsFree) {
  auto first = Listen("listen", "127.0.0.1:0");
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string address = "127.0.0.1:" + std::to_string(first->port);
  ConnectTo("127.0.0.1", first->port).Close();
  first->sockets.clear();
  const auto second = Listen("listen", address);
  EXPECT_TRUE(second.ok()) << second.status();
}

struct FailureCase {
  const char* name;
  const char* address;
  const char* reason;
};

class ListenerFailureSpec : public testing::TestWithParam<FailureCase> {};

TEST_P(ListenerFailureSpec, NamesFieldAddressReasonAndWhatToDo) {
  const auto listener = Listen("metrics_listen", GetParam().address);
  EXPECT_EQ(listener.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(listener.status().message()),
              HasSubstr(std::string("metrics_listen ") + GetParam().address +
                        " cannot be bound: " + GetParam().reason));
}

INSTANTIATE_TEST_SUITE_P(
    Failures, ListenerFailureSpec,
    testing::Values(
        FailureCase{"foreign_ipv4", "192.0.2.1:0",
                    "this machine does not have the address; choose one of its own"},
        FailureCase{"unknown_name", "no.such.host.invalid:0",
                    "the name has no address ("},
        FailureCase{"no_address", "nowhere", "\"nowhere\" is not host:port: no port"}),
    testing_support::CaseName());

TEST(ListenerFailureSpec, ATakenPortIsSaidSoForEveryAddress) {
  const auto first = Listen("listen", "0.0.0.0:0");
  ASSERT_TRUE(first.ok()) << first.status();
  const std::string port = std::to_string(first->port);
  for (const std::string host : {"0.0.0.0:", "[::]:", "127.0.0.1:", "localhost:"}) {
    const auto second = Listen("listen", host + port);
    EXPECT_EQ(second.status().message(),
              "listen " + host + port + " cannot be bound: another process has port " +
                  port +
                  "; choose another port, or stop that process (ss -ltnp names it)");
  }
}

[[noreturn]] void ListenOnPortOneAsNobody() {
  constexpr uid_t kNobody = 65534;
  if (geteuid() == 0 && setuid(kNobody) != 0) std::_Exit(3);
  const auto listener = Listen("listen", "127.0.0.1:1");
  std::fputs(std::string(listener.status().message()).c_str(), stderr);
  std::_Exit(0);
}

TEST(ListenerFailureSpec, APortThatNeedsRightsIsSaidSo) {
  int port_min = 1024;
  std::ifstream("/proc/sys/net/ipv4/ip_unprivileged_port_start") >> port_min;
  if (port_min <= 1) GTEST_SKIP() << "everybody may take every port here";
  EXPECT_EXIT(
      ListenOnPortOneAsNobody(), testing::ExitedWithCode(0),
      "listen 127.0.0.1:1 cannot be bound: this user may not take ports below " +
          std::to_string(port_min) +
          "; choose a higher port, or give the process CAP_NET_BIND_SERVICE");
}

}  // namespace
}  // namespace pbs::server
