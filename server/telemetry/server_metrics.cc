#include "server/telemetry/server_metrics.h"

#include <prometheus/family.h>
#include <array>
#include <cstddef>

#include "server/telemetry/metric_names.h"

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

// The family that a builder of prometheus-cpp makes.
template <class Builder>
auto& Family(Builder builder, Registry& registry, const MetricName& metric) {
  return builder.Name(metric.name).Help(metric.help).Register(registry);
}

Counter& AddCounter(Registry& registry, const MetricName& metric) {
  return Family(BuildCounter(), registry, metric).Add({});
}

Gauge& AddGauge(Registry& registry, const MetricName& metric) {
  return Family(BuildGauge(), registry, metric).Add({});
}

Histogram& AddHistogram(Registry& registry, const MetricName& metric,
                        const Buckets& buckets) {
  return Family(BuildHistogram(), registry, metric).Add({}, buckets);
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
    for (double bound = 0.001 / 64; bound < 4200; bound *= 2) buckets.push_back(bound);
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
    : queue_time(AddHistogram(registry, kQueueTimeName, TimeBuckets())),
      prefill_time(AddHistogram(registry, kPrefillTimeName, TimeBuckets())),
      time_to_first_layer(AddHistogram(registry, kFirstLayerName, TimeBuckets())),
      time_to_kv_ready(AddHistogram(registry, kKvReadyName, TimeBuckets())),
      coverage(AddHistogram(registry, kCoverageName, CoverageBuckets())),
      batch_requests(AddHistogram(registry, kBatchName, CountBuckets())),
      flops_computed(AddCounter(registry, kFlopsComputedName)),
      flops_dense(AddCounter(registry, kFlopsDenseName)),
      prompt_tokens(AddCounter(registry, kPromptTokensName)),
      threshold_lowered(AddCounter(registry, kThresholdLoweredName)),
      running(AddGauge(registry, kRunningName)),
      waiting(AddGauge(registry, kWaitingName)),
      backlog_tokens(AddGauge(registry, kBacklogTokensName)),
      backlog_seconds(AddGauge(registry, kBacklogSecondsName)),
      memory_budget(AddGauge(registry, kMemoryBudgetName)),
      stage_time_(AddPerLabel(Family(BuildHistogram(), registry, kStageTimeName),
                              "stage", kStageNames, TimeBuckets())),
      density_(AddPerLabel(Family(BuildHistogram(), registry, kDensityName), "method",
                           kMethodNames, RatioBuckets())),
      tokens_wasted_(AddPerLabel(Family(BuildCounter(), registry, kTokensWastedName),
                                 "reason", kWasteReasonNames)),
      rejected_(AddPerLabel(Family(BuildCounter(), registry, kRejectedName), "reason",
                            kRejectReasonNames)) {}

KvMetrics::KvMetrics(Registry& registry)
    : leases(AddGauge(registry, kLeasesName)),
      lease_expired(AddCounter(registry, kLeaseExpiredName)),
      transfer_bytes(AddCounter(registry, kTransferBytesName)),
      transfer_time(AddHistogram(registry, kTransferTimeName, TimeBuckets())),
      export_outstanding(AddGauge(registry, kExportOutstandingName)),
      held_(
          AddPerLabel(Family(BuildGauge(), registry, kKvHeldName), "tier", kTierNames)),
      transfer_failures_(
          AddPerLabel(Family(BuildCounter(), registry, kTransferFailuresName), "reason",
                      kTransferFailureNames)),
      region_requests_(
          AddPerLabel(Family(BuildCounter(), registry, kRegionRequestsName), "result",
                      kRegionResultNames)) {}

RpcMetrics::RpcMetrics(Registry& registry) : unread(AddCounter(registry, kUnreadName)) {
  auto& family = Family(BuildCounter(), registry, kRequestsName);
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
  Family(BuildGauge(), registry_, kBuildInfoName)
      .Add({{"version", labels.version}, {"commit", labels.commit}})
      .Set(1);
}

void ServerMetrics::SetBackendInfo(const BackendLabels& labels) {
  Family(BuildGauge(), registry_, kBackendInfoName)
      .Add(
          {{"backend", labels.backend}, {"isa", labels.isa}, {"device", labels.device}})
      .Set(1);
}

}  // namespace pbs::server
