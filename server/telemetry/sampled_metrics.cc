#include "server/telemetry/sampled_metrics.h"

#include <prometheus/client_metric.h>
#include <prometheus/metric_type.h>

#include <string_view>
#include <utility>

namespace pbs::server {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

MetricFamily GaugeFamily(std::string name, std::string help, double value) {
  ClientMetric metric;
  metric.gauge.value = value;
  return {std::move(name), std::move(help), MetricType::Gauge, {metric}};
}

struct Alias {
  std::string_view ours;
  const char* theirs;
};
constexpr Alias kAliases[] = {
    {"pbs_requests_waiting", "vllm:num_requests_waiting"},
    {"pbs_requests_running", "vllm:num_requests_running"},
    {"pbs_request_queue_time_seconds", "vllm:request_queue_time_seconds"},
    {"pbs_time_to_kv_ready_seconds", "vllm:time_to_first_token_seconds"},
};

double GaugeSum(const MetricFamily& family) {
  double sum = 0;
  for (const ClientMetric& metric : family.metric) sum += metric.gauge.value;
  return sum;
}

}  // namespace

SampledGauge::SampledGauge(std::string name, std::string help,
                           std::function<Values()> values)
    : name_(std::move(name)), help_(std::move(help)), values_(std::move(values)) {}

std::vector<MetricFamily> SampledGauge::Collect() const {
  MetricFamily family = {name_, help_, MetricType::Gauge, {}};
  for (const auto& [device, value] : values_()) {
    ClientMetric metric;
    metric.gauge.value = value;
    if (!device.empty()) metric.label.push_back({"device", device});
    family.metric.push_back(std::move(metric));
  }
  return {family};
}

VllmMetrics::VllmMetrics(const prometheus::Registry& registry, std::string model_name)
    : registry_(registry), model_name_(std::move(model_name)) {}

std::vector<MetricFamily> VllmMetrics::Collect() const {
  std::vector<MetricFamily> result;
  double held = 0;
  double budget = 0;
  for (MetricFamily& family : registry_.Collect()) {
    if (family.name == "pbs_kv_held_bytes") held = GaugeSum(family);
    if (family.name == "pbs_memory_budget_bytes") budget = GaugeSum(family);
    for (const Alias& alias : kAliases) {
      if (family.name != alias.ours) continue;
      family.name = alias.theirs;
      result.push_back(std::move(family));
      break;
    }
  }
  result.push_back(GaugeFamily("vllm:kv_cache_usage_perc",
                               "KV cache usage; 1 is all of it",
                               budget > 0 ? held / budget : 0));
  for (MetricFamily& family : result) {
    for (ClientMetric& metric : family.metric) {
      metric.label.push_back({"model_name", model_name_});
    }
  }
  return result;
}

}  // namespace pbs::server
