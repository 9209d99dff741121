// absl::Status -> grpc::Status with google.rpc details. The one file of this room that
// knows gRPC.
//
// Threading: stateless.
#pragma once

#include <grpcpp/support/status.h>

#include <cstddef>

#include "absl/status/status.h"

namespace pbs::server {

// Messages are cut here: trailers share one HTTP/2 header budget of 8 KiB.
inline constexpr size_t kGrpcMessageBytesMax = 1024;

// Same code; the message, cut to kGrpcMessageBytesMax at a character; and, when the
// status says when to try again (RetryAfter()), a google.rpc.Status with RetryInfo in
// the `grpc-status-details-bin` trailer.
grpc::Status ToGrpc(const absl::Status& status);

}  // namespace pbs::server
