#include "server/base/grpc_status.h"

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <string>

#include "absl/time/time.h"
#include "google/rpc/error_details.pb.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

// Cuts at the start of a UTF-8 character.
std::string Shortened(absl::string_view message) {
  if (message.size() <= kGrpcMessageBytesMax) return std::string(message);
  size_t end = kGrpcMessageBytesMax;
  while (end > 0 && (static_cast<uint8_t>(message[end]) & 0xC0u) == 0x80u) --end;
  return std::string(message.substr(0, end));
}

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message = Shortened(status.message());
  const auto delay = RetryAfter(status);
  if (!delay.has_value()) return {code, message};

  const timespec spec = absl::ToTimespec(*delay);
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(spec.tv_sec);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(spec.tv_nsec));
  google::rpc::Status details;
  details.set_code(static_cast<int32_t>(status.code()));
  details.set_message(message);
  details.add_details()->PackFrom(retry);
  return {code, message, details.SerializeAsString()};
}

}  // namespace pbs::server
