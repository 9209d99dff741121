#include "server/base/host_port.h"

#include <arpa/inet.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace pbs::server {
namespace {

constexpr int32_t kPortMax = 65'535;
constexpr size_t kHostBytesMax = 253;  // of a DNS name

bool IsIpv4(const std::string& host) {
  in_addr address;
  return inet_pton(AF_INET, host.c_str(), &address) == 1;
}

bool IsIpv6(const std::string& host) {
  in6_addr address;
  return inet_pton(AF_INET6, host.c_str(), &address) == 1;
}

bool IsName(const std::string& host) {
  return !host.empty() && host.size() <= kHostBytesMax &&
         std::all_of(host.begin(), host.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' ||
                  c == '-' || c == '_';
         });
}

absl::Status Bad(absl::string_view text, absl::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat("\"", text, "\" is not host:port: ", why));
}

}  // namespace

std::string HostPort::ToString() const {
  return IsIpv6(host) ? absl::StrCat("[", host, "]:", port)
                      : absl::StrCat(host, ":", port);
}

bool HostPort::IsLoopback() const {
  return host == "localhost" || host == "::1" ||
         (IsIpv4(host) && absl::StartsWith(host, "127."));
}

bool HostPort::IsEveryAddress() const { return host == "0.0.0.0" || host == "::"; }

bool IsIpAddress(const std::string& text) { return IsIpv4(text) || IsIpv6(text); }

absl::StatusOr<HostPort> ParseHostPort(absl::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return Bad(text, "no port");
  HostPort result;
  const absl::string_view port = text.substr(colon + 1);
  const bool digits =
      !port.empty() && std::all_of(port.begin(), port.end(), [](char c) {
        return absl::ascii_isdigit(static_cast<unsigned char>(c));
      });
  if (!digits || !absl::SimpleAtoi(port, &result.port) || result.port > kPortMax) {
    return Bad(text, absl::StrCat("port is not a number in [0, ", kPortMax, "]"));
  }
  absl::string_view host = text.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  result.host = std::string(host);
  if (bracketed ? !IsIpv6(result.host) : !IsName(result.host)) {
    return Bad(text, "host is no name, IPv4 address or [IPv6 address]");
  }
  return result;
}

}  // namespace pbs::server
