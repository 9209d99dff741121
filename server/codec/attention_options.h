// Converts AttentionOptions of the wire to and from AttentionOptions of the data plane,
// for requests and the configuration. A field of the wire is the option of the same
// name (pbs/attention_options.h), so a method needs no code here.
//
// Threading: stateless. It is a CMake target of its own (pbs::attention_options),
// because the other files of server/base do not need protobuf.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/v1/types.pb.h"

namespace pbs::server {

// Options of a Prefill that names no method (ServerConfig.default_attention).
struct AttentionProfile {
  AttentionOptions options;                 // without dense_fallback
  std::optional<bool> dense_fallback = {};  // unset: the RPC's own default

  bool operator==(const AttentionProfile&) const = default;
};

// Built-in options of a Prefill that names no method, the best first: a server takes
// the first that its backend runs. docs/BENCHMARKS.md, "Quality of a trained model",
// chose them by its rule: the first of all settings, the second of those with blocks of
// 128 tokens.
std::vector<AttentionProfile> DefaultProfiles();
AttentionProfile DefaultProfile();  // the first

// The dense_tail_blocks of a Prefill that names a method and leaves them out: a short
// question at the end of a prompt is lost in the mean of its block.
inline constexpr int32_t kPrefillTailBlocks = 2;
// `wire` with kPrefillTailBlocks where they apply: not to dense, not as published.
v1::AttentionOptions WithPrefillTail(v1::AttentionOptions wire);

// A message without a method takes `profile`. A message with one takes the documented
// defaults of that method for unset fields. `dense_fallback` is the RPC's default: it
// applies when neither the message nor an applicable profile sets the field. Ranges are
// not checked (ValidateProblem() does). Errors: InvalidArgument for an enum value
// outside its enum, and for as_published without a method.
absl::StatusOr<AttentionOptions> DecodeAttentionOptions(
    const v1::AttentionOptions& wire, const AttentionProfile& profile,
    bool dense_fallback);

// Errors as above.
absl::StatusOr<AttentionProfile> DecodeAttentionProfile(
    const v1::AttentionOptions& wire);

// Every field that the method has is set.
v1::AttentionOptions EncodeAttentionOptions(const AttentionOptions& options);
// As above, dense_fallback only where the profile sets it.
v1::AttentionOptions EncodeAttentionProfile(const AttentionProfile& profile);

// The thresholds of all query heads, [num_layers, num_heads]; empty for no layers.
// InvalidArgument for other numbers of layers or heads, or a threshold outside (0, 1].
absl::StatusOr<std::vector<float>> DecodeHeadThresholds(
    const google::protobuf::RepeatedPtrField<v1::LayerThresholds>& layers,
    int32_t num_layers, int32_t num_heads);

// The refusal of a method's threshold beside those of layers.
inline constexpr char kTwoThresholds[] =
    "attention sets a threshold beside the thresholds of layers; leave one out";
// Whether the method's message sets a threshold. Requires a method.
bool SetsThreshold(const v1::AttentionOptions& wire);
void ClearThreshold(v1::AttentionOptions& wire);

v1::Method EncodeMethod(Method method);

}  // namespace pbs::server
