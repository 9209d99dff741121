#include "server/config/server_settings.h"

namespace pbs::server {
namespace {

void ApplyAdmissionDefaults(v1::AdmissionConfig& config) {
  if (!config.has_memory_bytes_max()) config.set_memory_bytes_max(0);
  if (!config.has_queue_requests_max()) config.set_queue_requests_max(64);
  if (!config.has_tokens_max()) config.set_tokens_max(1 << 20);
  if (!config.has_attend_tokens_max()) config.set_attend_tokens_max(1 << 20);
  if (!config.has_upload_seconds_max()) config.set_upload_seconds_max(120);
  if (!config.has_upload_requests_max()) config.set_upload_requests_max(32);
}

void ApplyTransportDefaults(v1::TransportConfig& config) {
  if (!config.has_chunk_bytes()) config.set_chunk_bytes(1 << 20);
  if (!config.has_connections_max()) config.set_connections_max(1024);
  if (!config.has_metadata_bytes_max()) config.set_metadata_bytes_max(64 << 10);
  if (!config.has_concurrent_streams_max()) config.set_concurrent_streams_max(64);
  if (!config.has_memory_quota_bytes()) config.set_memory_quota_bytes(256 << 20);
  if (!config.has_stream_window_bytes()) config.set_stream_window_bytes(1 << 20);
  if (!config.has_keepalive_seconds()) config.set_keepalive_seconds(30);
  if (!config.has_keepalive_timeout_seconds()) config.set_keepalive_timeout_seconds(20);
  if (!config.has_write_stall_seconds_max()) config.set_write_stall_seconds_max(60);
}

}  // namespace

void ApplyDefaults(v1::ServerConfig& config) {
  if (!config.has_listen()) config.set_listen("127.0.0.1:50051");
  if (!config.has_metrics_listen()) config.set_metrics_listen("127.0.0.1:9464");
  if (!config.has_backend()) config.set_backend("auto");
  if (!config.has_reflection()) config.set_reflection(false);
  if (!config.has_drain_seconds_max()) config.set_drain_seconds_max(60);
  if (!config.has_vllm_metrics()) config.set_vllm_metrics(false);
  for (v1::ModelSource& model : *config.mutable_models()) {
    if (!model.has_kv_dtype()) model.set_kv_dtype("auto");
    if (!model.has_tokens_max()) model.set_tokens_max(0);
    if (!model.has_yarn_attn_factor()) {
      model.set_yarn_attn_factor(AttnFactorName(AttnFactor::kApplied));
    }
  }
  v1::CpuConfig& cpu = *config.mutable_cpu();
  if (!cpu.has_threads()) cpu.set_threads(0);
  if (!cpu.has_isa()) cpu.set_isa("auto");
  if (!cpu.has_compute_dtype()) cpu.set_compute_dtype("auto");
  v1::CudaConfig& cuda = *config.mutable_cuda();
  if (!cuda.has_device()) cuda.set_device(0);
  if (!cuda.has_module()) cuda.set_module("");
  if (!cuda.has_cublaslt()) cuda.set_cublaslt("");
  if (!cuda.has_memory_bytes_max()) cuda.set_memory_bytes_max(0);
  if (!cuda.has_devices()) cuda.set_devices("");
  v1::SchedulingConfig& scheduling = *config.mutable_scheduling();
  if (!scheduling.has_yield_share()) scheduling.set_yield_share(0.25);
  if (!scheduling.has_batch_tokens_max()) scheduling.set_batch_tokens_max(0);
  if (!scheduling.has_batch_prompt_tokens_max()) {
    scheduling.set_batch_prompt_tokens_max(1024);
  }
  ApplyAdmissionDefaults(*config.mutable_admission());
  v1::LeaseConfig& lease = *config.mutable_lease();
  if (!lease.has_ttl_seconds_default()) lease.set_ttl_seconds_default(60);
  if (!lease.has_ttl_seconds_max()) lease.set_ttl_seconds_max(600);
  if (!lease.has_leases_max()) lease.set_leases_max(1024);
  ApplyTransportDefaults(*config.mutable_transport());
  if (!config.log().has_level()) config.mutable_log()->set_level("info");
  v1::AttentionOptions& attention = *config.mutable_default_attention();
  if (attention.method_case() == v1::AttentionOptions::METHOD_NOT_SET) {
    attention.mutable_pbs();
  }
}

}  // namespace pbs::server
