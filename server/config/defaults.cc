#include <cstdint>
#include <vector>

#include "server/codec/attention_options.h"
#include "server/config/server_settings.h"

namespace pbs::server {
namespace {

void ApplyAdmissionDefaults(v1::AdmissionConfig& config) {
  const ServiceLimits limits;
  if (!config.has_memory_bytes_max()) {
    config.set_memory_bytes_max(ServerSettings().memory_bytes_max);
  }
  if (!config.has_queue_requests_max()) {
    config.set_queue_requests_max(limits.queue_requests_max);
  }
  if (!config.has_tokens_max()) config.set_tokens_max(limits.tokens_max);
  if (!config.has_attend_tokens_max()) {
    config.set_attend_tokens_max(limits.attend_tokens_max);
  }
  if (!config.has_upload_seconds_max()) {
    config.set_upload_seconds_max(limits.upload_seconds_max);
  }
  if (!config.has_upload_requests_max()) {
    config.set_upload_requests_max(limits.upload_requests_max);
  }
}

void ApplySchedulingDefaults(v1::SchedulingConfig& config) {
  const SchedulingSettings scheduling;
  if (!config.has_yield_share()) config.set_yield_share(scheduling.yield_share);
  if (!config.has_batch_tokens_max()) {
    config.set_batch_tokens_max(scheduling.batch_tokens_max);
  }
  if (!config.has_batch_prompt_tokens_max()) {
    config.set_batch_prompt_tokens_max(scheduling.batch_prompt_tokens_max);
  }
}

void ApplyLeaseDefaults(v1::LeaseConfig& config) {
  const LeaseOptions leases;
  if (!config.has_ttl_seconds_default()) {
    config.set_ttl_seconds_default(leases.ttl_seconds_default);
  }
  if (!config.has_ttl_seconds_max()) config.set_ttl_seconds_max(leases.ttl_seconds_max);
  if (!config.has_leases_max()) config.set_leases_max(leases.leases_max);
}

void ApplyTransportDefaults(v1::TransportConfig& config) {
  const TransportOptions transport;
  if (!config.has_chunk_bytes()) config.set_chunk_bytes(transport.chunk_bytes);
  if (!config.has_connections_max()) {
    config.set_connections_max(transport.connections_max);
  }
  if (!config.has_metadata_bytes_max()) {
    config.set_metadata_bytes_max(transport.metadata_bytes_max);
  }
  if (!config.has_concurrent_streams_max()) {
    config.set_concurrent_streams_max(transport.concurrent_streams_max);
  }
  if (!config.has_memory_quota_bytes()) {
    config.set_memory_quota_bytes(transport.memory_quota_bytes);
  }
  if (!config.has_stream_window_bytes()) {
    config.set_stream_window_bytes(transport.stream_window_bytes);
  }
  if (!config.has_keepalive_seconds()) {
    config.set_keepalive_seconds(transport.keepalive_seconds);
  }
  if (!config.has_keepalive_timeout_seconds()) {
    config.set_keepalive_timeout_seconds(transport.keepalive_timeout_seconds);
  }
  if (!config.has_write_stall_seconds_max()) {
    config.set_write_stall_seconds_max(transport.write_stall_seconds_max);
  }
}

void ApplyModelDefaults(v1::ModelSource& config) {
  const ModelSettings model;
  if (!config.has_kv_dtype()) config.set_kv_dtype("auto");
  if (!config.has_tokens_max()) config.set_tokens_max(model.tokens_max);
  if (!config.has_yarn_attn_factor()) {
    config.set_yarn_attn_factor(AttnFactorName(model.yarn_attn_factor));
  }
}

void ApplyBackendDefaults(v1::ServerConfig& config) {
  v1::CpuConfig& cpu = *config.mutable_cpu();
  const CpuSettings cpu_settings;
  if (!cpu.has_threads()) cpu.set_threads(cpu_settings.threads);
  if (!cpu.has_isa()) cpu.set_isa(cpu_settings.isa);
  if (!cpu.has_compute_dtype()) cpu.set_compute_dtype(cpu_settings.compute_dtype);
  v1::CudaConfig& cuda = *config.mutable_cuda();
  const CudaSettings cuda_settings;
  if (!cuda.has_device()) cuda.set_device(0);
  if (!cuda.has_devices()) cuda.set_devices("");
  if (!cuda.has_module()) cuda.set_module(cuda_settings.module);
  if (!cuda.has_cublaslt()) cuda.set_cublaslt(cuda_settings.cublaslt);
  if (!cuda.has_memory_bytes_max()) {
    cuda.set_memory_bytes_max(cuda_settings.memory_bytes_max);
  }
}

}  // namespace

std::vector<v1::AttentionOptions> DefaultAttentions(const v1::AttentionOptions& asked) {
  if (asked.method_case() != v1::AttentionOptions::METHOD_NOT_SET) {
    return {WithPrefillTail(asked)};
  }
  std::vector<v1::AttentionOptions> choices;
  for (const AttentionProfile& profile : DefaultProfiles()) {
    choices.push_back(EncodeAttentionProfile(profile));
    choices.back().MergeFrom(asked);
  }
  return choices;
}

void ApplyDefaults(v1::ServerConfig& config) {
  const ServerSettings settings;
  if (!config.has_listen()) config.set_listen(settings.service.listen);
  if (!config.has_metrics_listen()) config.set_metrics_listen(settings.metrics_listen);
  if (!config.has_advertise()) config.set_advertise(settings.advertise);
  if (!config.has_shared_memory_socket()) {
    config.set_shared_memory_socket(settings.shared_memory_socket);
  }
  if (!config.has_backend()) config.set_backend("auto");
  if (!config.has_reflection()) config.set_reflection(settings.service.reflection);
  if (!config.has_drain_seconds_max()) {
    config.set_drain_seconds_max(
        static_cast<int32_t>(absl::ToInt64Seconds(settings.drain_max)));
  }
  if (!config.has_vllm_metrics()) config.set_vllm_metrics(settings.vllm_metrics);
  for (v1::ModelSource& model : *config.mutable_models()) ApplyModelDefaults(model);
  ApplyBackendDefaults(config);
  ApplyAdmissionDefaults(*config.mutable_admission());
  ApplySchedulingDefaults(*config.mutable_scheduling());
  ApplyLeaseDefaults(*config.mutable_lease());
  ApplyTransportDefaults(*config.mutable_transport());
  if (!config.log().has_level()) config.mutable_log()->set_level("info");
  *config.mutable_default_attention() =
      DefaultAttentions(config.default_attention()).front();
}

}  // namespace pbs::server
