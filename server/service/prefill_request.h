// PrefillRequest -> plain values. The boundary that checks: what comes out is valid.
//
// Threading: stateless. Memory: the tokens once more, as int32.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/v1/prefill.pb.h"
#include "server/base/attention_options.h"
#include "server/transfer/kv_format.h"

namespace pbs::server {

// What a request must fit: the model and the server's settings.
struct PrefillLimits {
  int32_t tokens_max = 0;         // of the model and of the server
  std::string tokens_max_reason;  // ModelConfig::max_tokens_reason, if that decided
  int32_t vocab_size = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  AttentionProfile default_attention;
  int32_t chunk_bytes_default = 0;
};

enum class Delivery : uint8_t { kNone, kInline, kLease };

struct PrefillSpec {
  std::string request_id;
  std::vector<int32_t> tokens;
  AttentionOptions attention;
  Delivery delivery = Delivery::kNone;
  KvFormat inline_format;
  std::optional<int32_t> ttl_seconds;  // the lease store checks it
  int32_t top_logits = 0;
  bool all_logits_last_token = false;
  std::vector<int32_t> logit_positions;
  int32_t priority = 0;
  std::string idempotency_key;
  std::string tenant_salt;
};

// Every rule of prefill.proto but the model's name. Errors: InvalidArgument names
// field, value and limit (token ids never); Unimplemented for what is reserved.
absl::StatusOr<PrefillSpec> DecodePrefill(const v1::PrefillRequest& request,
                                          const PrefillLimits& limits);

// A name of everything that decides the result, for idempotency. What a request leaves
// to a default and what it spells out are the same. The request id, priority and time
// limits are not part of it.
std::string PrefillFingerprint(const PrefillSpec& spec, absl::string_view model_digest);

}  // namespace pbs::server
