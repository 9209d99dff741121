#include "server/base/advertise.h"

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/host_port.h"

namespace pbs::server {

absl::StatusOr<std::string> AdvertisedEndpoint(const std::string& advertise,
                                               const std::string& pod_ip,
                                               const std::string& listen,
                                               int32_t port) {
  if (!advertise.empty()) {
    HostPort given = *ParseHostPort(advertise);
    if (given.port == 0) given.port = port;
    return given.ToString();
  }
  if (!pod_ip.empty()) {
    if (!IsIpAddress(pod_ip)) {
      return absl::FailedPreconditionError(
          absl::StrCat("the environment variable ", kPodIpVariable, " \"", pod_ip,
                       "\" is no IP address; correct it, unset it or set advertise"));
    }
    return HostPort{pod_ip, port}.ToString();
  }
  const HostPort host = *ParseHostPort(listen);
  return host.IsEveryAddress() ? "" : HostPort{host.host, port}.ToString();
}

}  // namespace pbs::server
