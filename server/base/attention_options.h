// AttentionOptions of the wire <-> AttentionOptions of the data plane. The one place
// that knows both; requests and the configuration use it.
//
// Threading: stateless. A target of its own (pbs::attention_options), which needs
// protobuf; the rest of the room does not.
#pragma once

#include <optional>

#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/v1/types.pb.h"

namespace pbs::server {

// What a request that names no method gets (ServerConfig.default_attention).
struct AttentionProfile {
  AttentionOptions options;                 // dense_fallback apart
  std::optional<bool> dense_fallback = {};  // unset: the RPC's own default

  bool operator==(const AttentionProfile&) const = default;
};

// A message that names no method means `profile`; one that does starts from the
// documented defaults of that method. `dense_fallback` is the RPC's own default: what
// is meant where neither the message nor a profile that applies says. Ranges are not
// looked at (ValidateProblem()). Errors: InvalidArgument for an enum value outside its
// enum, Unimplemented for a method that is reserved.
absl::StatusOr<AttentionOptions> DecodeAttentionOptions(
    const v1::AttentionOptions& wire, const AttentionProfile& profile,
    bool dense_fallback);

// Errors as above.
absl::StatusOr<AttentionProfile> DecodeAttentionProfile(
    const v1::AttentionOptions& wire);

// Every field set.
v1::AttentionOptions EncodeAttentionOptions(const AttentionOptions& options);
// Every field set, dense_fallback only where the profile sets it.
v1::AttentionOptions EncodeAttentionProfile(const AttentionProfile& profile);

v1::Method EncodeMethod(Method method);

}  // namespace pbs::server
