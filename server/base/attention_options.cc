#include "server/base/attention_options.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

absl::StatusOr<Scope> DecodeScope(v1::Scope scope) {
  switch (scope) {
    case v1::SCOPE_UNSPECIFIED:
    case v1::KV_HEAD:
      return Scope::kKvHead;
    case v1::QUERY_HEAD:
      return Scope::kQueryHead;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("scope ", static_cast<int>(scope), " is not one of KV_HEAD (",
                       static_cast<int>(v1::KV_HEAD), "), QUERY_HEAD (",
                       static_cast<int>(v1::QUERY_HEAD), ")"));
  }
}

// Copies an optional field when it is set.
template <class T>
void Take(bool is_set, T value, T& target) {
  if (is_set) target = value;
}

AttentionOptions DecodeDense(const v1::DenseOptions& wire) {
  AttentionOptions options;
  options.method = Method::kDense;
  Take(wire.has_block_size(), wire.block_size(), options.block_size);
  return options;
}

absl::StatusOr<AttentionOptions> DecodePbs(const v1::PbsOptions& wire) {
  AttentionOptions options;
  options.method = Method::kPbs;
  Take(wire.has_block_size(), wire.block_size(), options.block_size);
  Take(wire.has_segment_size(), wire.segment_size(), options.segment_size);
  Take(wire.has_threshold(), wire.threshold(), options.threshold);
  PBS_ABSL_ASSIGN_OR_RETURN(options.scope, DecodeScope(wire.scope()));
  Take(wire.has_force_first_block(), wire.force_first_block(),
       options.force_first_block);
  options.use_given_order = wire.use_given_order();
  options.use_given_lists = wire.use_given_lists();
  return options;
}

AttentionOptions DecodeMeanPooling(const v1::MeanPoolingOptions& wire) {
  AttentionOptions options;
  options.method = Method::kMeanPooling;
  Take(wire.has_block_size(), wire.block_size(), options.block_size);
  Take(wire.has_threshold(), wire.threshold(), options.threshold);
  Take(wire.has_force_first_block(), wire.force_first_block(),
       options.force_first_block);
  options.use_given_lists = wire.use_given_lists();
  return options;
}

absl::Status Reserved(const char* method) {
  return absl::UnimplementedError(absl::StrCat("attention method ", method,
                                               " is reserved; this server runs dense, "
                                               "pbs and mean_pooling"));
}

absl::StatusOr<AttentionOptions> DecodeMethod(const v1::AttentionOptions& wire,
                                              const AttentionOptions& profile) {
  switch (wire.method_case()) {
    case v1::AttentionOptions::kDense:
      return DecodeDense(wire.dense());
    case v1::AttentionOptions::kPbs:
      return DecodePbs(wire.pbs());
    case v1::AttentionOptions::kMeanPooling:
      return DecodeMeanPooling(wire.mean_pooling());
    case v1::AttentionOptions::kXattention:
      return Reserved("xattention");
    case v1::AttentionOptions::kMinference:
      return Reserved("minference");
    case v1::AttentionOptions::kFlexprefill:
      return Reserved("flexprefill");
    case v1::AttentionOptions::METHOD_NOT_SET:
      break;
  }
  return profile;
}

}  // namespace

absl::StatusOr<AttentionOptions> DecodeAttentionOptions(
    const v1::AttentionOptions& wire, const AttentionProfile& profile,
    bool dense_fallback) {
  PBS_ABSL_ASSIGN_OR_RETURN(AttentionOptions options,
                            DecodeMethod(wire, profile.options));
  options.dense_fallback = dense_fallback;
  if (wire.method_case() == v1::AttentionOptions::METHOD_NOT_SET) {
    options.dense_fallback = profile.dense_fallback.value_or(dense_fallback);
  }
  Take(wire.has_dense_fallback(), wire.dense_fallback(), options.dense_fallback);
  Take(wire.has_coverage_rows(), wire.coverage_rows(), options.coverage_rows);
  return options;
}

absl::StatusOr<AttentionProfile> DecodeAttentionProfile(
    const v1::AttentionOptions& wire) {
  AttentionProfile profile;
  PBS_ABSL_ASSIGN_OR_RETURN(profile.options, DecodeAttentionOptions(wire, {}, false));
  profile.options.dense_fallback = false;
  if (wire.has_dense_fallback()) profile.dense_fallback = wire.dense_fallback();
  return profile;
}

v1::AttentionOptions EncodeAttentionOptions(const AttentionOptions& options) {
  v1::AttentionOptions wire;
  switch (options.method) {
    case Method::kDense:
      wire.mutable_dense()->set_block_size(options.block_size);
      break;
    case Method::kPbs: {
      v1::PbsOptions& pbs = *wire.mutable_pbs();
      pbs.set_block_size(options.block_size);
      pbs.set_segment_size(options.segment_size);
      pbs.set_threshold(options.threshold);
      pbs.set_scope(options.scope == Scope::kKvHead ? v1::KV_HEAD : v1::QUERY_HEAD);
      pbs.set_force_first_block(options.force_first_block);
      pbs.set_use_given_order(options.use_given_order);
      pbs.set_use_given_lists(options.use_given_lists);
      break;
    }
    case Method::kMeanPooling: {
      v1::MeanPoolingOptions& mean = *wire.mutable_mean_pooling();
      mean.set_block_size(options.block_size);
      mean.set_threshold(options.threshold);
      mean.set_force_first_block(options.force_first_block);
      mean.set_use_given_lists(options.use_given_lists);
      break;
    }
  }
  wire.set_dense_fallback(options.dense_fallback);
  wire.set_coverage_rows(options.coverage_rows);
  return wire;
}

v1::AttentionOptions EncodeAttentionProfile(const AttentionProfile& profile) {
  v1::AttentionOptions wire = EncodeAttentionOptions(profile.options);
  wire.clear_dense_fallback();
  if (profile.dense_fallback.has_value()) {
    wire.set_dense_fallback(*profile.dense_fallback);
  }
  return wire;
}

v1::Method EncodeMethod(Method method) {
  switch (method) {
    case Method::kDense:
      return v1::DENSE;
    case Method::kPbs:
      return v1::PBS;
    case Method::kMeanPooling:
      return v1::MEAN_POOLING;
  }
  return v1::METHOD_UNSPECIFIED;
}

}  // namespace pbs::server
