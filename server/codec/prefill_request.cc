#include "server/codec/prefill_request.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/status.h"
#include "server/codec/attention_options.h"
#include "server/codec/request_limits.h"
#include "server/codec/sha256.h"
#include "server/codec/thresholds_digest.h"

namespace pbs::server {
namespace {

absl::Status CheckTexts(const v1::PrefillRequest& request) {
  PBS_ABSL_RETURN_IF_ERROR(CheckText("request_id", request.request_id().size()));
  PBS_ABSL_RETURN_IF_ERROR(
      CheckText("idempotency_key", request.idempotency_key().size()));
  PBS_ABSL_RETURN_IF_ERROR(CheckText("profile", request.profile().size()));
  return CheckText("tenant_salt", request.tenant_salt().size());
}

absl::StatusOr<std::vector<int32_t>> DecodeTokens(const v1::PrefillRequest& request,
                                                  const PrefillLimits& limits) {
  const int32_t count = request.token_ids_size();
  const absl::Status in_range =
      CheckRange("number of token_ids", count, 1, limits.tokens_max);
  if (!in_range.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(in_range.message(), limits.tokens_max_reason));
  }
  std::vector<int32_t> tokens;
  tokens.reserve(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    const uint32_t token = request.token_ids(i);
    if (token >= static_cast<uint32_t>(limits.vocab_size)) {
      // Without the id: the message is logged, and no log has a part of a prompt.
      return absl::InvalidArgumentError(absl::StrCat(
          "token_ids[", i, "] is not below vocab_size ", limits.vocab_size));
    }
    tokens.push_back(static_cast<int32_t>(token));
  }
  return tokens;
}

// nullptr when the request names none.
absl::StatusOr<const Profile*> FindProfile(const v1::PrefillRequest& request,
                                           const PrefillLimits& limits) {
  const std::string& name = request.profile();
  if (name.empty()) return nullptr;
  for (const Profile& profile : limits.profiles) {
    if (profile.name != name) continue;
    if (request.attention().method_case() == v1::AttentionOptions::METHOD_NOT_SET) {
      return &profile;
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "profile \"", name, "\" and a method in attention exclude each other"));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("no profile \"", absl::Utf8SafeCHexEscape(name), "\"; model \"",
                   limits.model_name, "\" has ",
                   absl::StrJoin(limits.profiles, ", ",
                                 [](std::string* out, const Profile& profile) {
                                   absl::StrAppend(out, "\"", profile.name, "\"");
                                 })));
}

absl::StatusOr<AttentionOptions> DecodeAttention(const v1::AttentionOptions& wire,
                                                 const Profile* profile,
                                                 int32_t num_tokens,
                                                 const PrefillLimits& limits) {
  AttentionProfile base = limits.default_attention;
  if (profile != nullptr) base = {profile->options, profile->dense_fallback};
  PBS_ABSL_ASSIGN_OR_RETURN(
      AttentionOptions options,
      DecodeAttentionOptions(WithPrefillTail(wire), base, /*dense_fallback=*/true));
  if (options.use_given_order || options.use_given_lists) {
    return absl::InvalidArgumentError(
        absl::StrCat(options.use_given_order ? "use_given_order" : "use_given_lists",
                     " true is for Attend only: a prefill brings no tensors"));
  }
  AttentionProblem problem;
  problem.shape = {limits.num_heads,
                   limits.num_kv_heads,
                   limits.head_dim,
                   {{num_tokens, num_tokens}}};
  problem.options = options;
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(ValidateProblem(problem)));
  return options;
}

// Thresholds that the request brings for the query heads.
absl::Status DecodeLayers(const v1::PrefillRequest& request,
                          const PrefillLimits& limits, PrefillSpec& spec) {
  if (request.layers().empty()) return absl::OkStatus();
  const v1::AttentionOptions& attention = request.attention();
  if (!request.profile().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layers and profile \"", request.profile(), "\" exclude each other"));
  }
  if (attention.method_case() == v1::AttentionOptions::METHOD_NOT_SET ||
      !HasThreshold(spec.attention.method)) {
    return absl::InvalidArgumentError(
        "layers needs a method in attention that has a threshold");
  }
  if (SetsThreshold(attention)) return absl::InvalidArgumentError(kTwoThresholds);
  PBS_ABSL_ASSIGN_OR_RETURN(
      std::vector<float> thresholds,
      DecodeHeadThresholds(request.layers(), limits.num_layers, limits.num_heads));
  if (AreEqual(thresholds)) {
    spec.attention.threshold = thresholds.front();
    return absl::OkStatus();
  }
  spec.thresholds_digest = ThresholdsDigest(thresholds);
  spec.own_thresholds = std::move(thresholds);
  spec.head_thresholds = spec.own_thresholds;
  return absl::OkStatus();
}

// What the server may do about a deadline.
absl::Status DecodeThresholdMin(const v1::PrefillRequest& request,
                                const PrefillLimits& limits, PrefillSpec& spec) {
  if (!request.has_threshold_min()) return absl::OkStatus();
  const float lowest = request.threshold_min();
  const std::string given = absl::StrCat("threshold_min ", lowest);
  const AttentionOptions& attention = spec.attention;
  if (!HasThreshold(attention.method)) {
    return absl::InvalidArgumentError(
        absl::StrCat(given, " needs a method with a threshold; ",
                     MethodName(attention.method), " has none"));
  }
  if (!spec.head_thresholds.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(given, " needs one threshold; here each query head has its own"));
  }
  if (!(lowest > 0 && lowest <= attention.threshold)) {
    return absl::InvalidArgumentError(absl::StrCat(
        given, " is outside (0, ", attention.threshold, "], up to the threshold"));
  }
  if (!limits.has_deadline) {
    return absl::InvalidArgumentError(
        absl::StrCat(given, " needs a deadline of the call"));
  }
  spec.threshold_min = lowest;
  return absl::OkStatus();
}

absl::Status DecodePush(const v1::KvDelivery::Push& wire, const PrefillLimits& limits,
                        PrefillSpec& spec) {
  const std::string& target = wire.target();
  if (target.empty()) {
    return absl::InvalidArgumentError(
        "delivery.push.target \"\" is empty; it names the host:port of a sink");
  }
  const auto& allowed = limits.push_targets;
  if (std::find(allowed.begin(), allowed.end(), target) == allowed.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("delivery.push.target \"",
                     absl::Utf8SafeCHexEscape(
                         absl::string_view(target).substr(0, kRequestTextBytesMax)),
                     "\" is not one of this server's push_targets"));
  }
  spec.delivery = Delivery::kPush;
  spec.push_target = target;
  PBS_ABSL_ASSIGN_OR_RETURN(spec.push_format,
                            DecodeKvFormat(wire, limits.chunk_bytes_default));
  return absl::OkStatus();
}

absl::Status DecodeDelivery(const v1::KvDelivery& wire, const PrefillLimits& limits,
                            PrefillSpec& spec) {
  switch (wire.delivery_case()) {
    case v1::KvDelivery::kPush:
      return DecodePush(wire.push(), limits, spec);
    case v1::KvDelivery::kInline: {
      spec.delivery = Delivery::kInline;
      PBS_ABSL_ASSIGN_OR_RETURN(
          spec.inline_format,
          DecodeKvFormat(wire.inline_(), limits.chunk_bytes_default));
      return absl::OkStatus();
    }
    case v1::KvDelivery::kLease:
      spec.delivery = Delivery::kLease;
      if (wire.lease().has_ttl_seconds()) spec.ttl_seconds = wire.lease().ttl_seconds();
      return absl::OkStatus();
    case v1::KvDelivery::kNone:
    case v1::KvDelivery::DELIVERY_NOT_SET:
      break;
  }
  return absl::OkStatus();
}

absl::Status DecodeLogits(const v1::PrefillRequest& request, PrefillSpec& spec) {
  PBS_ABSL_RETURN_IF_ERROR(
      CheckRange("top_logits", request.top_logits(), 0, kTopLogitsMax));
  PBS_ABSL_RETURN_IF_ERROR(CheckRange("number of logit_positions",
                                      request.logit_positions_size(), 0,
                                      kLogitPositionsMax));
  if (request.logit_positions_size() > 0 && request.top_logits() == 0) {
    return absl::InvalidArgumentError(
        "logit_positions need a top_logits of at least 1, not 0");
  }
  const size_t num_tokens = spec.tokens.size();
  for (int32_t i = 0; i < request.logit_positions_size(); ++i) {
    const uint32_t position = request.logit_positions(i);
    if (position >= num_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("logit_positions[", i, "] ", position,
                       " is not below the number of token_ids ", num_tokens));
    }
    spec.logit_positions.push_back(static_cast<int32_t>(position));
  }
  spec.top_logits = request.top_logits();
  spec.all_logits_last_token = request.all_logits_last_token();
  return absl::OkStatus();
}

absl::Status DecodeQueryLayers(const v1::PrefillRequest& request,
                               const PrefillLimits& limits, PrefillSpec& spec) {
  const auto& layers = request.capture_query_layers();
  if (layers.empty()) return absl::OkStatus();
  if (spec.delivery != Delivery::kLease) {
    return absl::InvalidArgumentError(
        "capture_query_layers needs delivery lease: a fetch delivers the queries");
  }
  PBS_ABSL_RETURN_IF_ERROR(CheckRange("number of capture_query_layers", layers.size(),
                                      0, limits.num_layers));
  for (int32_t i = 0; i < layers.size(); ++i) {
    PBS_ABSL_RETURN_IF_ERROR(CheckRange(absl::StrCat("capture_query_layers[", i, "]"),
                                        layers[i], 0, limits.num_layers - 1));
    if (i > 0 && layers[i] <= layers[i - 1]) {
      return absl::InvalidArgumentError(
          absl::StrCat("capture_query_layers[", i, "] ", layers[i],
                       " is not above the layer before it, ", layers[i - 1]));
    }
  }
  spec.query_layers.assign(layers.begin(), layers.end());
  return absl::OkStatus();
}

void AddIntegers(const std::vector<int32_t>& values, Sha256& hash) {
  hash.AddField(
      {reinterpret_cast<const char*>(values.data()), sizeof(int32_t) * values.size()});
}

}  // namespace

absl::StatusOr<PrefillSpec> DecodePrefill(const v1::PrefillRequest& request,
                                          const PrefillLimits& limits) {
  PrefillSpec spec;
  PBS_ABSL_RETURN_IF_ERROR(CheckTexts(request));
  if (request.has_prefix_ticket()) {
    return absl::UnimplementedError(
        "prefix_ticket is reserved: this server reuses no prefixes yet");
  }
  PBS_ABSL_RETURN_IF_ERROR(
      CheckRange("priority", request.priority(), -kPriorityMax, kPriorityMax));
  PBS_ABSL_ASSIGN_OR_RETURN(spec.tokens, DecodeTokens(request, limits));
  PBS_ABSL_ASSIGN_OR_RETURN(const Profile* const profile, FindProfile(request, limits));
  PBS_ABSL_ASSIGN_OR_RETURN(
      spec.attention,
      DecodeAttention(request.attention(), profile, request.token_ids_size(), limits));
  if (profile != nullptr) {
    spec.head_thresholds = profile->head_thresholds;
    spec.thresholds_digest = profile->thresholds_digest;
  }
  PBS_ABSL_RETURN_IF_ERROR(DecodeLayers(request, limits, spec));
  PBS_ABSL_RETURN_IF_ERROR(DecodeThresholdMin(request, limits, spec));
  PBS_ABSL_RETURN_IF_ERROR(DecodeDelivery(request.delivery(), limits, spec));
  PBS_ABSL_RETURN_IF_ERROR(DecodeLogits(request, spec));
  PBS_ABSL_RETURN_IF_ERROR(DecodeQueryLayers(request, limits, spec));
  if (!request.idempotency_key().empty() && spec.delivery != Delivery::kLease) {
    return absl::InvalidArgumentError(
        "idempotency_key needs delivery lease: equal keys return the same lease");
  }
  spec.request_id = request.request_id();
  spec.priority = request.priority();
  spec.idempotency_key = request.idempotency_key();
  spec.tenant_salt = request.tenant_salt();
  return spec;
}

std::string PrefillFingerprint(const PrefillSpec& spec,
                               absl::string_view model_digest) {
  Sha256 hash;
  hash.AddField({model_digest.data(), model_digest.size()});
  AddIntegers(spec.tokens, hash);
  AddIntegers(spec.logit_positions, hash);
  AddIntegers(spec.query_layers, hash);
  hash.AddField(EncodeAttentionOptions(spec.attention).SerializeAsString());
  hash.AddField(absl::StrCat(spec.top_logits, " ", spec.all_logits_last_token));
  hash.AddField(spec.tenant_salt);
  hash.AddField(spec.thresholds_digest);
  hash.AddField(absl::StrCat(spec.threshold_min.value_or(0)));
  return hash.Finish();
}

}  // namespace pbs::server
