// The address of this server in the tickets that it gives.
//
// Threading: stateless.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace pbs::server {

// The variable of the environment in which Kubernetes passes a pod's address, when the
// manifest says so.
inline constexpr char kPodIpVariable[] = "POD_IP";

// host:port at which other machines reach the server that listens on `listen` with
// `port`: `advertise`, where port 0 stands for `port`; without it the address `pod_ip`;
// without both the host of `listen`. "" when that stands for every address.
// `advertise` and `listen` are valid.
//
// Errors: FailedPrecondition when `pod_ip` is used and is no IP address.
absl::StatusOr<std::string> AdvertisedEndpoint(const std::string& advertise,
                                               const std::string& pod_ip,
                                               const std::string& listen, int32_t port);

}  // namespace pbs::server
