// Metrics that are computed when they are scraped.
//
// Threading: Collect() runs on the metrics server's threads.
#pragma once

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "server/telemetry/metric_names.h"

namespace pbs::server {

// A gauge that calls a function for its value at every scrape. The function must be
// safe from any thread.
class SampledGauge final : public prometheus::Collectable {
 public:
  // Values by the label `device`; the name "" means no label.
  using Values = std::vector<std::pair<std::string, double>>;

  SampledGauge(const MetricName& metric, std::function<Values()> values);
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const MetricName metric_;
  const std::function<Values()> values_;
};

// Metrics of this server under vLLM's names, for dashboards and gateways that read
// those:
//
//   vllm:num_requests_waiting          pbs_requests_waiting
//   vllm:num_requests_running          pbs_requests_running
//   vllm:request_queue_time_seconds    pbs_request_queue_time_seconds
//   vllm:time_to_first_token_seconds   pbs_time_to_kv_ready_seconds
//   vllm:kv_cache_usage_perc           pbs_kv_held_bytes / pbs_memory_budget_bytes, 0-1
//
// Every series carries model_name, as those readers expect.
class VllmMetrics final : public prometheus::Collectable {
 public:
  // `registry` holds ServerMetrics and must outlive this.
  VllmMetrics(const prometheus::Registry& registry, std::string model_name);
  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const prometheus::Registry& registry_;
  const std::string model_name_;
};

}  // namespace pbs::server
