#include "server/service/call_record.h"
#include <cstddef>
#include <string>

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
  // What the client gets is cut, and the log with it: messages may quote the request.
  grpc::Status sent = ToGrpc(status);
  parts_.log.Write(LevelOf(status.code()), "call",
                   {{"rpc", kRpcNames[static_cast<size_t>(rpc_)]},
                    {"code", code},
                    {"seconds", seconds},
                    {"request_id", request_id_},
                    {"message", sent.error_message()}});
  return sent;
}

}  // namespace pbs::server
