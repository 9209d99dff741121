// Spec: server/base/advertise.h.
#include "server/base/advertise.h"

#include <gtest/gtest.h>

#include "tests/support/case_name.h"

namespace pbs::server {
namespace {

struct EndpointCase {
  const char* name;
  const char* advertise;
  const char* pod_ip;
  const char* listen;
  const char* endpoint;
};

class AdvertisedEndpointSpec : public testing::TestWithParam<EndpointCase> {};

TEST_P(AdvertisedEndpointSpec, IsWhereOthersReachTheServer) {
  const EndpointCase& c = GetParam();
  const auto endpoint = AdvertisedEndpoint(c.advertise, c.pod_ip, c.listen, 50051);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  EXPECT_EQ(*endpoint, c.endpoint);
}

INSTANTIATE_TEST_SUITE_P(
    Settings, AdvertisedEndpointSpec,
    testing::Values(
        EndpointCase{"the_setting", "node-7.example:9000", "10.0.0.7", "0.0.0.0:0",
                     "node-7.example:9000"},
        EndpointCase{"the_setting_with_the_bound_port", "node-7:0", "", "0.0.0.0:0",
                     "node-7:50051"},
        EndpointCase{"the_pod", "", "10.0.0.7", "0.0.0.0:0", "10.0.0.7:50051"},
        EndpointCase{"an_ipv6_pod", "", "fd00::7", "[::]:0", "[fd00::7]:50051"},
        EndpointCase{"what_it_listens_on", "", "", "10.1.2.3:0", "10.1.2.3:50051"},
        EndpointCase{"a_name_it_listens_on", "", "", "localhost:0", "localhost:50051"},
        EndpointCase{"ipv6", "", "", "[::1]:0", "[::1]:50051"},
        EndpointCase{"nothing_is_known", "", "", "0.0.0.0:50051", ""},
        EndpointCase{"nothing_is_known_ipv6", "", "", "[::]:50051", ""}),
    testing_support::CaseName());

TEST(AdvertisedEndpointSpec, APodAddressThatIsNoneIsRefused) {
  EXPECT_EQ(AdvertisedEndpoint("", "the pod", "0.0.0.0:0", 50051).status(),
            absl::FailedPreconditionError(
                "the environment variable POD_IP \"the pod\" is no IP address; correct "
                "it, unset it or set advertise"));
}

TEST(AdvertisedEndpointSpec, APodAddressThatIsNotUsedIsNotLookedAt) {
  EXPECT_EQ(AdvertisedEndpoint("a:1", "the pod", "0.0.0.0:0", 50051).value(), "a:1");
}

}  // namespace
}  // namespace pbs::server
