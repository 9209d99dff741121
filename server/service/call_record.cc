#include "server/service/call_record.h"

#include <string_view>

#include "server/base/grpc_status.h"

namespace pbs::server {
namespace {

// A caller's mistake or wish is his business; ours is an error.
LogLevel LevelOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDataLoss:
      return LogLevel::kError;
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
      return LogLevel::kWarning;
    default:
      return LogLevel::kInfo;
  }
}

}  // namespace

grpc::Status CallRecord::End(const absl::Status& status) const {
  parts_.metrics.rpc.Requests(rpc_, status.code()).Increment();
  const double seconds = absl::ToDoubleSeconds(parts_.clock.Now() - start_);
  const std::string code = absl::StatusCodeToString(status.code());
  const absl::string_view message = status.message();
  parts_.log.Write(LevelOf(status.code()), "call",
                   {{"rpc", kRpcNames[static_cast<size_t>(rpc_)]},
                    {"code", code},
                    {"seconds", seconds},
                    {"request_id", request_id_},
                    {"message", std::string_view(message.data(), message.size())}});
  return ToGrpc(status);
}

}  // namespace pbs::server
