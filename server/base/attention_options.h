// AttentionOptions of the wire <-> AttentionOptions of the data plane. The one place
// that knows both; requests and the configuration use it.
//
// Threading: stateless. A target of its own (pbs::attention_options), which needs
// protobuf; the rest of the room does not.
#pragma once

#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/v1/types.pb.h"

namespace pbs::server {

// A message that names no method means `profile`; one that does starts from the
// documented defaults of that method. `dense_fallback` is what an unset dense_fallback
// means here: the RPCs differ. Ranges are not looked at (ValidateProblem()).
// Errors: InvalidArgument for an enum value outside its enum, Unimplemented for a
// method that is reserved.
absl::StatusOr<AttentionOptions> DecodeAttentionOptions(
    const v1::AttentionOptions& wire, const AttentionOptions& profile,
    bool dense_fallback);

// Every field set.
v1::AttentionOptions EncodeAttentionOptions(const AttentionOptions& options);

v1::Method EncodeMethod(Method method);

}  // namespace pbs::server
