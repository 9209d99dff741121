// absl::Status -> grpc::Status with google.rpc details. No other file of server/base
// uses gRPC.
//
// Threading: stateless.
#pragma once

#include <grpcpp/support/status.h>

#include <cstddef>

#include "absl/status/status.h"

namespace pbs::server {

// The longest message; longer ones are cut. Trailers share one HTTP/2 header limit of 8
// KiB.
inline constexpr size_t kGrpcMessageBytesMax = 1024;

// Keeps the code, and the message up to kGrpcMessageBytesMax, cut between characters. A
// status with a retry delay (RetryAfter()) also gets a google.rpc.Status with RetryInfo
// in the `grpc-status-details-bin` trailer.
grpc::Status ToGrpc(const absl::Status& status);

}  // namespace pbs::server
