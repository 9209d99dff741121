#include "server/telemetry/sampled_metrics.h"

#include <prometheus/client_metric.h>
#include <prometheus/metric_type.h>

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pbs::server {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

MetricFamily GaugeFamily(const MetricName& name, double value) {
  ClientMetric metric;
  metric.gauge.value = value;
  return {name.name, name.help, MetricType::Gauge, {metric}};
}

struct Alias {
  std::string_view ours;
  const char* theirs;
};
constexpr Alias kAliases[] = {
    {kWaitingName.name, kVllmWaitingName},
    {kRunningName.name, kVllmRunningName},
    {kQueueTimeName.name, kVllmQueueTimeName},
    {kKvReadyName.name, kVllmFirstTokenName},
};

double GaugeSum(const MetricFamily& family) {
  double sum = 0;
  for (const ClientMetric& metric : family.metric) sum += metric.gauge.value;
  return sum;
}

}  // namespace

SampledGauge::SampledGauge(const MetricName& metric, std::function<Values()> values)
    : metric_(metric), values_(std::move(values)) {}

std::vector<MetricFamily> SampledGauge::Collect() const {
  MetricFamily family = {metric_.name, metric_.help, MetricType::Gauge, {}};
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
    if (family.name == kKvHeldName.name) held = GaugeSum(family);
    if (family.name == kMemoryBudgetName.name) budget = GaugeSum(family);
    for (const Alias& alias : kAliases) {
      if (family.name != alias.ours) continue;
      family.name = alias.theirs;
      result.push_back(std::move(family));
      break;
    }
  }
  result.push_back(GaugeFamily(kVllmCacheUsageName, budget > 0 ? held / budget : 0));
  for (MetricFamily& family : result) {
    for (ClientMetric& metric : family.metric) {
      metric.label.push_back({"model_name", model_name_});
    }
  }
  return result;
}

}  // namespace pbs::server
