// Spec: server/telemetry/metrics_server.h. One server for the suite: destroying one can
// take two seconds.
#include "server/telemetry/metrics_server.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>

#include "server/telemetry/sampled_metrics.h"

namespace pbs::server {
namespace {

using testing::HasSubstr;

std::string HttpGet(int port, const std::string& path) {
  const int socket_fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(socket_fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)),
            0);
  const std::string request =
      "GET " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
  EXPECT_EQ(send(socket_fd, request.data(), request.size(), 0),
            static_cast<ssize_t>(request.size()));
  std::string reply;
  char buffer[4096];
  for (ssize_t n; (n = recv(socket_fd, buffer, sizeof(buffer), 0)) > 0;) {
    reply.append(buffer, static_cast<size_t>(n));
  }
  close(socket_fd);
  return reply;
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
  const std::string reply = HttpGet(server_->port(), "/metrics");
  EXPECT_THAT(reply, HasSubstr("200 OK"));
  EXPECT_THAT(reply, HasSubstr("pbs_x 5"));
  EXPECT_THAT(reply, HasSubstr("pbs_y 6"));
  EXPECT_THAT(reply, HasSubstr("pbs_y{device=\"0\"} 7"));
}

TEST_F(MetricsServerSpec, OtherPathsAreNotFound) {
  EXPECT_THAT(HttpGet(server_->port(), "/etc/passwd"), HasSubstr("404"));
}

TEST_F(MetricsServerSpec, AnAddressInUseIsAnErrorThatNamesIt) {
  const std::string listen = "127.0.0.1:" + std::to_string(server_->port());
  const auto second = MetricsServer::Create(listen, {});
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr("metrics_listen " + listen + " cannot be bound"));
}

}  // namespace
}  // namespace pbs::server
