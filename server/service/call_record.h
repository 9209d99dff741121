// Ends a call: logs it, counts it and converts its status.
//
// Threading: one owner; End() from any thread, once.
#pragma once

#include <string>
#include <utility>

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/service/parts.h"

namespace pbs::server {

class CallRecord {
 public:
  CallRecord(const ServiceParts& parts, Rpc rpc)
      : parts_(parts), rpc_(rpc), start_(parts.clock.Now()) {}

  // The id in the log; empty until known.
  void set_request_id(std::string id) { request_id_ = std::move(id); }

  // Returns the status for the client. Writes one log line, whose message is cut like
  // the client's, and counts pbs_requests_total{rpc,code}.
  grpc::Status End(const absl::Status& status) const;

 private:
  const ServiceParts& parts_;
  const Rpc rpc_;
  const absl::Time start_;
  std::string request_id_;
};

}  // namespace pbs::server
