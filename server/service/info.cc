#include "server/service/info.h"
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "absl/time/time.h"
#include "server/codec/attention_options.h"
#include "server/codec/kv_format.h"
#include "server/codec/request_limits.h"
#include "server/service/memory_formula.h"

namespace pbs::server {

namespace {

v1::ProfileInfo DescribeProfile(const Profile& profile) {
  v1::ProfileInfo info;
  info.set_name(profile.name);
  *info.mutable_attention() =
      EncodeAttentionProfile({profile.options, profile.dense_fallback});
  const std::vector<float>& thresholds = profile.head_thresholds;
  if (thresholds.empty()) return info;
  ClearThreshold(*info.mutable_attention());
  info.set_mean_threshold(std::accumulate(thresholds.begin(), thresholds.end(), 0.0) /
                          static_cast<double>(thresholds.size()));
  info.set_dense_heads(
      static_cast<int32_t>(std::count(thresholds.begin(), thresholds.end(), 1.0f)));
  info.set_thresholds_digest(profile.thresholds_digest);
  return info;
}

}  // namespace

v1::ModelInfo DescribeModel(const ServedModel& served) {
  const Model& model = served.model();
  const ModelConfig& config = model.config();
  v1::ModelInfo info;
  info.set_name(served.name);
  info.set_architecture(ArchitectureName(config.architecture));
  info.set_model_digest(model.digest());
  info.set_num_layers(config.num_layers);
  info.set_num_heads(config.num_heads);
  info.set_num_kv_heads(config.num_kv_heads);
  info.set_head_dim(config.head_dim);
  info.set_hidden_size(config.hidden_size);
  info.set_vocab_size(config.vocab_size);
  info.set_tokens_max(served.tokens_max);
  info.set_kv_dtype(EncodeDType(model.kv_dtype()));
  info.set_compute_dtype(EncodeDType(model.compute_dtype()));
  info.set_weight_bytes(model.weight_bytes());
  info.set_kv_bytes_per_token(model.kv_shape(1).bytes());
  for (int32_t token : config.eos_token_ids) {
    info.add_eos_token_ids(static_cast<uint32_t>(token));
  }
  info.set_rope_attention_factor(config.rope.attention_factor);
  for (const Profile& profile : served.profiles) {
    *info.add_profiles() = DescribeProfile(profile);
  }
  return info;
}

v1::ServerInfo DescribeServer(const ServiceOptions& options, const LeaseStore& leases,
                              int64_t memory_bytes_max) {
  v1::ServerInfo info;
  info.set_version(options.version);
  info.set_protocol_version(kProtocolVersion);
  info.set_commit(options.commit);
  info.set_epoch(leases.epoch());
  v1::BackendInfo& backend = *info.add_backends();
  backend.set_name(options.backend.name);
  backend.set_isa(options.backend.isa);
  backend.set_device(options.backend.device);
  for (int32_t head_dim : options.backend.head_dims) backend.add_head_dims(head_dim);
  for (DType dtype : options.backend.dtypes) backend.add_dtypes(EncodeDType(dtype));
  for (Method method : options.backend.methods) info.add_methods(EncodeMethod(method));
  v1::ServerLimits& limits = *info.mutable_limits();
  limits.set_tokens_max(options.limits.tokens_max);
  limits.set_attend_tokens_max(options.limits.attend_tokens_max);
  limits.set_queue_requests_max(options.limits.queue_requests_max);
  limits.set_memory_bytes_max(memory_bytes_max);
  limits.set_chunk_bytes_default(options.transport.chunk_bytes);
  limits.set_chunk_bytes_max(kChunkBytesMax);
  limits.set_receive_message_bytes_max(
      ReceiveMessageBytesMax(options.limits.tokens_max));
  limits.set_lease_ttl_seconds_default(leases.options().ttl_seconds_default);
  limits.set_lease_ttl_seconds_max(leases.options().ttl_seconds_max);
  limits.set_logit_positions_max(kLogitPositionsMax);
  limits.set_top_logits_max(kTopLogitsMax);
  *info.mutable_default_attention() = EncodeAttentionProfile(options.default_attention);
  return info;
}

v1::KvLease DescribeLease(const LeaseView& lease) {
  v1::KvLease wire;
  *wire.mutable_ticket() = lease.ticket;
  if (lease.expires != absl::InfiniteFuture()) {
    wire.set_expires_unix_ms(absl::ToUnixMillis(lease.expires));
  }
  wire.set_ttl_seconds(lease.ttl_seconds);
  return wire;
}

v1::KvDescriptor DescribeKv(const LeaseView& lease) {
  const KvShape& shape = lease.kv->cache().shape();
  v1::KvDescriptor wire;
  *wire.mutable_lease() = DescribeLease(lease);
  wire.set_model(lease.model);
  wire.set_state(lease.done == nullptr ? v1::RUNNING : v1::COMPLETE);
  wire.set_num_layers(shape.num_layers);
  wire.set_layers_ready(lease.kv->layers_ready());
  wire.set_num_kv_heads(shape.num_kv_heads);
  wire.set_head_dim(shape.head_dim);
  wire.set_num_tokens(shape.capacity);
  wire.set_dtype(EncodeDType(shape.dtype));
  wire.set_bytes(shape.bytes());
  const CapturedQueries& queries = lease.kv->queries();
  wire.mutable_query_layers()->Add(queries.layers().begin(), queries.layers().end());
  wire.set_num_query_heads(queries.shape().num_heads);
  wire.set_query_bytes(queries.bytes());
  if (lease.done != nullptr) wire.set_first_token_id(lease.done->first_token_id());
  wire.set_prompt_digest(lease.prompt_digest);
  return wire;
}

}  // namespace pbs::server
