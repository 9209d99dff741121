// Spec: server/base/host_port.h.
#include "server/base/host_port.h"

#include <gtest/gtest.h>
#include <cstdint>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

struct GoodCase {
  const char* name;
  const char* text;
  const char* host;
  int32_t port;
  bool loopback;
};

class HostPortSpec : public testing::TestWithParam<GoodCase> {};

TEST_P(HostPortSpec, IsReadAndSaidAgain) {
  const GoodCase& c = GetParam();
  const auto result = ParseHostPort(c.text);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->host, c.host);
  EXPECT_EQ(result->port, c.port);
  EXPECT_EQ(result->IsLoopback(), c.loopback);
  EXPECT_EQ(result->ToString(), c.text);
}

INSTANTIATE_TEST_SUITE_P(
    Texts, HostPortSpec,
    testing::Values(GoodCase{"loopback", "127.0.0.1:50051", "127.0.0.1", 50051, true},
                    GoodCase{"other_loopback", "127.8.0.1:1", "127.8.0.1", 1, true},
                    GoodCase{"localhost", "localhost:0", "localhost", 0, true},
                    GoodCase{"any", "0.0.0.0:65535", "0.0.0.0", 65535, false},
                    GoodCase{"ipv6_loopback", "[::1]:50051", "::1", 50051, true},
                    GoodCase{"ipv6_any", "[::]:50051", "::", 50051, false},
                    GoodCase{"name", "prefill-0.pods:1", "prefill-0.pods", 1, false},
                    GoodCase{"name_like_loopback", "127.example:1", "127.example", 1,
                             false}),
    testing_support::CaseName());

struct BadCase {
  const char* name;
  const char* text;
  const char* message;
};

class BadHostPortSpec : public testing::TestWithParam<BadCase> {};

TEST_P(BadHostPortSpec, SaysWhatIsWrong) {
  EXPECT_EQ(ParseHostPort(GetParam().text).status(),
            absl::InvalidArgumentError(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Texts, BadHostPortSpec,
    testing::Values(
        BadCase{"empty", "", "\"\" is not host:port: no port"},
        BadCase{"no_port", "localhost", "\"localhost\" is not host:port: no port"},
        BadCase{"no_host", ":1",
                "\":1\" is not host:port: host is no name, IPv4 address or [IPv6 "
                "address]"},
        BadCase{"empty_port",
                "a:", "\"a:\" is not host:port: port is not a number in [0, 65535]"},
        BadCase{"port_past_the_limit", "a:65536",
                "\"a:65536\" is not host:port: port is not a number in [0, 65535]"},
        BadCase{"port_with_sign", "a:+1",
                "\"a:+1\" is not host:port: port is not a number in [0, 65535]"},
        BadCase{"ipv6_without_brackets", "::1:50051",
                "\"::1:50051\" is not host:port: host is no name, IPv4 address or "
                "[IPv6 address]"},
        BadCase{"brackets_without_ipv6", "[localhost]:1",
                "\"[localhost]:1\" is not host:port: host is no name, IPv4 address or "
                "[IPv6 address]"},
        BadCase{"space", "a b:1",
                "\"a b:1\" is not host:port: host is no name, IPv4 address or [IPv6 "
                "address]"}),
    testing_support::CaseName());

}  // namespace
}  // namespace pbs::server
