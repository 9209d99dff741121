// Spec: server/telemetry/metrics_server.h.
#include "server/telemetry/metrics_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>
#include <vector>

#include "server/telemetry/sampled_metrics.h"
#include "tests/support/case_name.h"
#include "tests/support/tcp_socket.h"

namespace pbs::server {
namespace {

using testing::AllOf;
using testing::AnyOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing_support::ConnectTo;
using testing_support::HasIpv6;
using testing_support::ReadAll;

std::string Ask(const FileDescriptor& connection, const std::string& request) {
  const std::string text =
      request + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
  EXPECT_EQ(send(connection.get(), text.data(), text.size(), 0),
            static_cast<ssize_t>(text.size()));
  return ReadAll(connection);
}

std::string Ask(int port, const std::string& request) {
  return Ask(ConnectTo("127.0.0.1", port), request);
}

class MetricsServerSpec : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto registry = std::make_shared<prometheus::Registry>();
    prometheus::BuildGauge().Name("pbs_x").Register(*registry).Add({}).Set(5);
    auto sampled = std::make_shared<SampledGauge>(MetricName{"pbs_y", "y"}, [] {
      return SampledGauge::Values{{"", 6}, {"0", 7}};
    });
    auto server = MetricsServer::Create("localhost:0", {registry, sampled});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = server->release();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  static MetricsServer* server_;
};

MetricsServer* MetricsServerSpec::server_ = nullptr;

TEST_F(MetricsServerSpec, PortZeroPicksOneAndSaysWhich) {
  EXPECT_GT(server_->port(), 0);
}

TEST_F(MetricsServerSpec, ServesEverySourceAsText) {
  EXPECT_THAT(
      Ask(server_->port(), "GET /metrics"),
      AllOf(HasSubstr("200 OK"), HasSubstr("Content-Type: text/plain; version=0.0.4"),
            HasSubstr("pbs_x 5"), HasSubstr("pbs_y 6"),
            HasSubstr("pbs_y{device=\"0\"} 7")));
}

TEST_F(MetricsServerSpec, HeadAnswersAsGetDoesWithoutThePage) {
  EXPECT_THAT(Ask(server_->port(), "HEAD /metrics"),
              AllOf(HasSubstr("200 OK"), HasSubstr("Content-Type: text/plain"),
                    Not(HasSubstr("Content-Length: 0")), Not(HasSubstr("pbs_x"))));
}

struct RequestCase {
  const char* name;
  const char* request;
  const char* answer;
};

class MetricsRequestSpec : public MetricsServerSpec,
                           public testing::WithParamInterface<RequestCase> {};

TEST_P(MetricsRequestSpec, IsAnsweredWithItsCode) {
  EXPECT_THAT(Ask(server_->port(), GetParam().request), HasSubstr(GetParam().answer));
}

INSTANTIATE_TEST_SUITE_P(
    Requests, MetricsRequestSpec,
    testing::Values(RequestCase{"query", "GET /metrics?name[]=pbs_x", "200 OK"},
                    RequestCase{"root", "GET /", "404 Not Found"},
                    RequestCase{"file", "GET /etc/passwd", "404 Not Found"},
                    RequestCase{"longer_path", "GET /metrics/x", "404 Not Found"},
                    RequestCase{"post", "POST /metrics", "405 Method Not Allowed"},
                    RequestCase{"allowed", "PUT /metrics", "Allow: GET, HEAD"}),
    testing_support::CaseName());

// libmicrohttpd 0.9 answers, 1.0 hangs up.
TEST_F(MetricsServerSpec, WhatIsNoHttpIsRefusedAndTheNextIsServed) {
  EXPECT_THAT(Ask(server_->port(), "hello"),
              AnyOf(IsEmpty(), HasSubstr("400 Bad Request")));
  EXPECT_THAT(Ask(server_->port(), "GET /metrics"), HasSubstr("pbs_x 5"));
}

TEST_F(MetricsServerSpec, IdleConnectionsAreInNobodysWay) {
  std::vector<FileDescriptor> idle;
  for (unsigned i = 0; i + 1 < kMetricsConnectionsMax; ++i) {
    idle.push_back(ConnectTo("127.0.0.1", server_->port()));
    ASSERT_TRUE(idle.back().is_open());
  }
  EXPECT_THAT(Ask(server_->port(), "GET /metrics"), HasSubstr("pbs_x 5"));
}

TEST_F(MetricsServerSpec, MoreConnectionsThanItTakesWaitForTheIdleOnesToBeClosed) {
  std::vector<FileDescriptor> idle;
  for (unsigned i = 0; i < 2 * kMetricsConnectionsMax; ++i) {
    idle.push_back(ConnectTo("127.0.0.1", server_->port()));
    ASSERT_TRUE(idle.back().is_open());
  }
  EXPECT_EQ(ReadAll(idle.front()), "");
  idle.clear();
  EXPECT_THAT(Ask(server_->port(), "GET /metrics"), HasSubstr("pbs_x 5"));
}

TEST_F(MetricsServerSpec, ListensOnIpv6) {
  if (!HasIpv6()) GTEST_SKIP() << "this machine has no IPv6";
  const auto server = MetricsServer::Create("[::1]:0", {});
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_THAT(Ask(ConnectTo("::1", (*server)->port()), "GET /metrics"),
              HasSubstr("200 OK"));
}

TEST_F(MetricsServerSpec, AnAddressInUseIsAnErrorThatNamesIt) {
  const std::string port = std::to_string(server_->port());
  const auto second = MetricsServer::Create("127.0.0.1:" + port, {});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr("metrics_listen 127.0.0.1:" + port +
                        " cannot be bound: another process has port " + port));
}

}  // namespace
}  // namespace pbs::server
