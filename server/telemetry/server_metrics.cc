#include "server/telemetry/server_metrics.h"

#include <prometheus/family.h>

namespace pbs::server {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Registry;
using Buckets = Histogram::BucketBoundaries;

Counter& AddCounter(Registry& registry, const char* name, const char* help) {
  return BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

Gauge& AddGauge(Registry& registry, const char* name, const char* help) {
  return BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

Histogram& AddHistogram(Registry& registry, const char* name, const char* help,
                        const Buckets& buckets) {
  return BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

// One metric of `family` per name.
template <size_t kSize, class Metric, class... Extra>
PerLabel<Metric, kSize> AddPerLabel(prometheus::Family<Metric>& family,
                                    const char* label,
                                    const std::array<const char*, kSize>& names,
                                    const Extra&... extra) {
  PerLabel<Metric, kSize> metrics;
  for (size_t i = 0; i < kSize; ++i) {
    metrics[i] = &family.Add({{label, names[i]}}, extra...);
  }
  return metrics;
}

}  // namespace

const Buckets& TimeBuckets() {
  static const Buckets kBuckets = [] {
    Buckets buckets;
    for (double bound = 0.001; bound < 4200; bound *= 2) buckets.push_back(bound);
    return buckets;
  }();
  return kBuckets;
}

const Buckets& CountBuckets() {
  static const Buckets kBuckets = {1, 2, 4, 8, 16, 32, 64, 128, 256};
  return kBuckets;
}

const Buckets& RatioBuckets() {
  static const Buckets kBuckets = [] {
    Buckets buckets;
    for (int percent = 5; percent <= 100; percent += 5) {
      buckets.push_back(percent / 100.0);
    }
    return buckets;
  }();
  return kBuckets;
}

const Buckets& CoverageBuckets() {
  static const Buckets kBuckets = {0.5,  0.7,  0.8,  0.85,  0.9,   0.925, 0.95,
                                   0.97, 0.98, 0.99, 0.995, 0.999, 1.0};
  return kBuckets;
}

EngineMetrics::EngineMetrics(Registry& registry)
    : queue_time(AddHistogram(registry, "pbs_request_queue_time_seconds",
                              "From admission to the first step", TimeBuckets())),
      prefill_time(AddHistogram(registry, "pbs_request_prefill_time_seconds",
                                "Execution time of finished prefills", TimeBuckets())),
      time_to_first_layer(AddHistogram(registry, "pbs_time_to_first_layer_seconds",
                                       "From admission to the first layer's KV",
                                       TimeBuckets())),
      time_to_kv_ready(AddHistogram(registry, "pbs_time_to_kv_ready_seconds",
                                    "From admission to the last layer's KV",
                                    TimeBuckets())),
      coverage(AddHistogram(registry, "pbs_attention_coverage_ratio",
                            "Attention mass held by the selected blocks",
                            CoverageBuckets())),
      batch_requests(AddHistogram(registry, "pbs_prefill_batch_requests",
                                  "Prompts that shared a run", CountBuckets())),
      flops_computed(AddCounter(registry, "pbs_attention_flops_computed_total",
                                "Attention FLOPs executed")),
      flops_dense(AddCounter(registry, "pbs_attention_flops_dense_total",
                             "Attention FLOPs that dense attention would need")),
      prompt_tokens(AddCounter(registry, "pbs_prompt_tokens_total",
                               "Prompt tokens of finished prefills")),
      running(AddGauge(registry, "pbs_requests_running",
                       "Requests started and not finished")),
      waiting(AddGauge(registry, "pbs_requests_waiting", "Requests queued")),
      backlog_tokens(AddGauge(registry, "pbs_prefill_backlog_tokens",
                              "Prompt tokens admitted and not finished")),
      backlog_seconds(AddGauge(registry, "pbs_prefill_backlog_seconds",
                               "Predicted time until all admitted work is done")),
      memory_budget(AddGauge(registry, "pbs_memory_budget_bytes",
                             "Bytes that admission may charge")),
      stage_time_(AddPerLabel(BuildHistogram()
                                  .Name("pbs_stage_time_seconds")
                                  .Help("Time of one stage of a finished request")
                                  .Register(registry),
                              "stage", kStageNames, TimeBuckets())),
      density_(AddPerLabel(BuildHistogram()
                               .Name("pbs_attention_density_ratio")
                               .Help("Executed over causal blocks of one attention")
                               .Register(registry),
                           "method", kMethodNames, RatioBuckets())),
      tokens_wasted_(AddPerLabel(BuildCounter()
                                     .Name("pbs_prefill_tokens_wasted_total")
                                     .Help("Prompt tokens computed in vain")
                                     .Register(registry),
                                 "reason", kWasteReasonNames)),
      rejected_(AddPerLabel(BuildCounter()
                                .Name("pbs_requests_rejected_total")
                                .Help("Requests refused before any work was done")
                                .Register(registry),
                            "reason", kRejectReasonNames)) {}

KvMetrics::KvMetrics(Registry& registry)
    : leases(AddGauge(registry, "pbs_kv_leases", "Leases held")),
      lease_expired(
          AddCounter(registry, "pbs_kv_lease_expired_total", "Leases freed by expiry")),
      transfer_bytes(AddCounter(registry, "pbs_kv_transfer_bytes_total",
                                "KV payload bytes handed to the transport")),
      transfer_time(AddHistogram(registry, "pbs_kv_transfer_time_seconds",
                                 "Time of one KV transfer", TimeBuckets())),
      export_outstanding(AddGauge(registry, "pbs_kv_export_outstanding_bytes",
                                  "KV bytes held and not yet fetched")),
      held_(AddPerLabel(BuildGauge()
                            .Name("pbs_kv_held_bytes")
                            .Help("Bytes of all KV caches")
                            .Register(registry),
                        "tier", kTierNames)),
      transfer_failures_(AddPerLabel(BuildCounter()
                                         .Name("pbs_kv_transfer_failures_total")
                                         .Help("KV transfers that ended early")
                                         .Register(registry),
                                     "reason", kTransferFailureNames)) {}

RpcMetrics::RpcMetrics(Registry& registry) {
  auto& family = BuildCounter()
                     .Name("pbs_requests_total")
                     .Help("Finished calls")
                     .Register(registry);
  for (size_t rpc = 0; rpc < kRpcNames.size(); ++rpc) {
    for (size_t code = 0; code < kCodeNames.size(); ++code) {
      requests_[rpc][code] =
          &family.Add({{"rpc", kRpcNames[rpc]}, {"code", kCodeNames[code]}});
    }
  }
}

Counter& RpcMetrics::Requests(Rpc rpc, absl::StatusCode code) const {
  auto index = static_cast<size_t>(code);
  if (index >= kCodeNames.size())
    index = static_cast<size_t>(absl::StatusCode::kUnknown);
  return *requests_[static_cast<size_t>(rpc)][index];
}

void ServerMetrics::SetBuildInfo(const BuildLabels& labels) {
  BuildGauge()
      .Name("pbs_build_info")
      .Help("Version of the server; always 1")
      .Register(registry_)
      .Add({{"version", labels.version}, {"commit", labels.commit}})
      .Set(1);
}

void ServerMetrics::SetBackendInfo(const BackendLabels& labels) {
  BuildGauge()
      .Name("pbs_backend_info")
      .Help("Backend that runs attention; always 1")
      .Register(registry_)
      .Add(
          {{"backend", labels.backend}, {"isa", labels.isa}, {"device", labels.device}})
      .Set(1);
}

}  // namespace pbs::server
