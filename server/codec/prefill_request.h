// Converts a PrefillRequest to checked plain values.
//
// Threading: stateless. Memory: a copy of the tokens as int32.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pbs/attention.h"
#include "pbs/v1/prefill.pb.h"
#include "server/codec/attention_options.h"
#include "server/codec/kv_format.h"
#include "server/engine/profile.h"

namespace pbs::server {

// Limits of a request, from the model and the server's settings.
struct PrefillLimits {
  int32_t tokens_max = 0;  // the lower limit of model and server
  // ModelConfig::max_tokens_reason, if the model's limit is the lower one
  std::string tokens_max_reason;
  int32_t vocab_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  AttentionProfile default_attention;
  std::span<const Profile> profiles = {};  // of the model
  absl::string_view model_name = {};
  bool has_deadline = false;  // of the call
  int32_t chunk_bytes_default = 0;
  std::span<const std::string> push_targets = {};
};

enum class Delivery : uint8_t { kNone, kInline, kLease, kPush };

struct PrefillSpec {
  std::string request_id;
  std::vector<int32_t> tokens;
  AttentionOptions attention;
  // Of a profile, as Profile has them, or of the request, in own_thresholds; empty:
  // attention.threshold.
  std::span<const float> head_thresholds = {};
  std::vector<float> own_thresholds = {};  // moving the spec leaves them in place
  std::string thresholds_digest = {};
  // The lowest threshold to which the server may go for the deadline.
  std::optional<float> threshold_min = {};
  Delivery delivery = Delivery::kNone;
  KvFormat inline_format;
  std::string push_target;  // one of PrefillLimits::push_targets
  KvFormat push_format;
  std::optional<int32_t> ttl_seconds;  // the lease store checks it
  int32_t top_logits = 0;
  bool all_logits_last_token = false;
  std::vector<int32_t> logit_positions;
  std::vector<int32_t> query_layers;  // whose queries are captured, ascending
  int32_t priority = 0;
  std::string idempotency_key;
  std::string tenant_salt;
};

// Checks every rule of prefill.proto except the model's name. Errors: InvalidArgument
// names field, value and limit, but never a token id; Unimplemented for reserved
// fields.
absl::StatusOr<PrefillSpec> DecodePrefill(const v1::PrefillRequest& request,
                                          const PrefillLimits& limits);

// A digest of all that decides the result, for idempotency. An unset field and its
// explicit default give the same digest. Request id, priority and time limits are not
// part of it, and neither is what a deadline made of the threshold: call it before.
std::string PrefillFingerprint(const PrefillSpec& spec, absl::string_view model_digest);

}  // namespace pbs::server
