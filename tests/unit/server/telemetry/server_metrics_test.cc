// Spec: server/telemetry/server_metrics.h and sampled_metrics.h.
#include "server/telemetry/server_metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <ctime>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "server/telemetry/process_metrics.h"
#include "server/telemetry/sampled_metrics.h"

namespace pbs::server {
namespace {

using prometheus::MetricFamily;
using prometheus::MetricType;
using testing::HasSubstr;
using testing::IsSupersetOf;

class ServerMetricsSpec : public testing::Test {
 protected:
  std::map<std::string, MetricFamily> Families() const {
    std::map<std::string, MetricFamily> families;
    for (MetricFamily& family : registry_.Collect()) {
      const std::string name = family.name;
      EXPECT_TRUE(families.emplace(name, std::move(family)).second) << name;
    }
    return families;
  }
  std::string Text() const {
    return prometheus::TextSerializer().Serialize(registry_.Collect());
  }

  prometheus::Registry registry_;
  ServerMetrics metrics_{registry_};
};

TEST_F(ServerMetricsSpec, EveryMetricOfTheProtocolIsThereFromTheStart) {
  std::set<std::string> names;
  for (const auto& [name, family] : Families()) {
    names.insert(name);
    EXPECT_FALSE(family.metric.empty()) << name;
  }
  EXPECT_THAT(names, IsSupersetOf({"pbs_request_queue_time_seconds",
                                   "pbs_request_prefill_time_seconds",
                                   "pbs_time_to_first_layer_seconds",
                                   "pbs_time_to_kv_ready_seconds",
                                   "pbs_stage_time_seconds",
                                   "pbs_attention_density_ratio",
                                   "pbs_attention_flops_computed_total",
                                   "pbs_attention_flops_dense_total",
                                   "pbs_attention_coverage_ratio",
                                   "pbs_prefill_batch_requests",
                                   "pbs_prompt_tokens_total",
                                   "pbs_prefill_tokens_wasted_total",
                                   "pbs_requests_rejected_total",
                                   "pbs_requests_total",
                                   "pbs_requests_unread_total",
                                   "pbs_requests_running",
                                   "pbs_requests_waiting",
                                   "pbs_prefill_backlog_tokens",
                                   "pbs_prefill_backlog_seconds",
                                   "pbs_kv_held_bytes",
                                   "pbs_kv_leases",
                                   "pbs_kv_lease_expired_total",
                                   "pbs_kv_transfer_bytes_total",
                                   "pbs_kv_transfer_time_seconds",
                                   "pbs_kv_transfer_failures_total",
                                   "pbs_kv_export_outstanding_bytes"}));
}

TEST_F(ServerMetricsSpec, NamesHaveThePrefixAndTheUnitOfTheirType) {
  for (const auto& [name, family] : Families()) {
    EXPECT_TRUE(name.starts_with("pbs_")) << name;
    EXPECT_EQ(name.ends_with("_total"), family.type == MetricType::Counter) << name;
    EXPECT_FALSE(family.help.empty()) << name;
    if (family.type == MetricType::Histogram) {
      EXPECT_TRUE(name.ends_with("_seconds") || name.ends_with("_ratio") ||
                  name.ends_with("_requests"))
          << name;
    }
  }
}

TEST_F(ServerMetricsSpec, TimesResolveSixteenMicrosecondsAndReachAnHour) {
  const auto& buckets = TimeBuckets();
  EXPECT_LE(buckets.front(), 16e-6);
  EXPECT_NE(std::find(buckets.begin(), buckets.end(), 0.001), buckets.end());
  EXPECT_GE(buckets.back(), 3600);
  for (size_t i = 1; i < buckets.size(); ++i) {
    EXPECT_DOUBLE_EQ(buckets[i], 2 * buckets[i - 1]);
  }
}

TEST_F(ServerMetricsSpec, RatiosReachOne) {
  EXPECT_DOUBLE_EQ(RatioBuckets().back(), 1);
  EXPECT_DOUBLE_EQ(CoverageBuckets().back(), 1);
}

TEST_F(ServerMetricsSpec, LabelsSelectTheirOwnSeries) {
  metrics_.engine.Rejected(RejectReason::kQueueFull).Increment();
  metrics_.engine.TokensWasted(WasteReason::kCancelled).Increment(7);
  metrics_.engine.StageTime(Stage::kAttend).Observe(0.5);
  metrics_.engine.Density(Method::kMeanPooling).Observe(0.3);
  metrics_.kv.Held(Tier::kHost).Set(4096);
  metrics_.kv.TransferFailed(TransferFailure::kLeaseGone).Increment();
  metrics_.rpc.Requests(Rpc::kFetch, absl::StatusCode::kNotFound).Increment();
  const std::string text = Text();
  EXPECT_THAT(text, HasSubstr("pbs_requests_rejected_total{reason=\"queue_full\"} 1"));
  EXPECT_THAT(text, HasSubstr("pbs_requests_rejected_total{reason=\"memory\"} 0"));
  EXPECT_THAT(text,
              HasSubstr("pbs_prefill_tokens_wasted_total{reason=\"cancelled\"} 7"));
  EXPECT_THAT(text, HasSubstr("pbs_stage_time_seconds_count{stage=\"attend\"} 1"));
  EXPECT_THAT(
      text, HasSubstr("pbs_attention_density_ratio_count{method=\"mean_pooling\"} 1"));
  EXPECT_THAT(text, HasSubstr("pbs_kv_held_bytes{tier=\"host\"} 4096"));
  EXPECT_THAT(text,
              HasSubstr("pbs_kv_transfer_failures_total{reason=\"lease_gone\"} 1"));
  EXPECT_THAT(text,
              HasSubstr("pbs_requests_total{code=\"NOT_FOUND\",rpc=\"fetch\"} 1"));
}

TEST_F(ServerMetricsSpec, StagesThatNoBackendHasAreNotExported) {
  const std::string text = Text();
  EXPECT_THAT(text, HasSubstr("pbs_stage_time_seconds_count{stage=\"send\"} 0"));
  EXPECT_THAT(text, testing::Not(HasSubstr("stage=\"copy\"")));
}

TEST_F(ServerMetricsSpec, ACodeOutsideTheCanonicalOnesCountsAsUnknown) {
  EXPECT_EQ(&metrics_.rpc.Requests(Rpc::kAttend, static_cast<absl::StatusCode>(99)),
            &metrics_.rpc.Requests(Rpc::kAttend, absl::StatusCode::kUnknown));
}

TEST_F(ServerMetricsSpec, CodesAreIndexedByTheirValue) {
  for (int code = 0; code < static_cast<int>(kCodeNames.size()); ++code) {
    EXPECT_EQ(absl::StatusCodeToString(static_cast<absl::StatusCode>(code)),
              kCodeNames[code]);
  }
}

TEST_F(ServerMetricsSpec, InfoMetricsAreOneWithTheirLabels) {
  metrics_.SetBuildInfo({.version = "1.2.3", .commit = "abc"});
  metrics_.SetBackendInfo({.backend = "cpu", .isa = "avx2", .device = "a \"b\""});
  EXPECT_THAT(Text(), HasSubstr("pbs_build_info{commit=\"abc\",version=\"1.2.3\"} 1"));
  EXPECT_THAT(
      Text(),
      HasSubstr(R"(pbs_backend_info{backend="cpu",device="a \"b\"",isa="avx2"} 1)"));
}

TEST(SampledGaugeSpec, AsksForItsValueAtEveryScrape) {
  double value = 1;
  const SampledGauge gauge(kMemoryChargedName, [&] {
    return SampledGauge::Values{{"", value}};
  });
  EXPECT_EQ(gauge.Collect().front().metric.front().gauge.value, 1);
  value = 2;
  EXPECT_EQ(gauge.Collect().front().metric.front().gauge.value, 2);
  EXPECT_EQ(gauge.Collect().front().name, "pbs_memory_charged_bytes");
}

// Values of ProcessMetrics by name.
std::map<std::string, double> ProcessValues() {
  std::map<std::string, double> values;
  for (const MetricFamily& family : ProcessMetrics().Collect()) {
    const auto& metric = family.metric.front();
    values[family.name] =
        family.type == MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  return values;
}

TEST(ProcessMetricsSpec, TellsMemoryTimeStartAndDescriptors) {
  const auto before = ProcessValues();
  ASSERT_EQ(before.size(), 5u);
  EXPECT_GT(before.at("process_resident_memory_bytes"), 1 << 20);
  const auto now = static_cast<double>(time(nullptr));
  EXPECT_LE(before.at("process_start_time_seconds"), now + 1);
  EXPECT_GT(before.at("process_start_time_seconds"), now - 3600);
  EXPECT_GE(before.at("process_max_fds"), before.at("process_open_fds"));
  const int descriptors[2] = {dup(STDERR_FILENO), dup(STDERR_FILENO)};
  volatile double work = 0;
  while (ProcessValues().at("process_cpu_seconds_total") ==
         before.at("process_cpu_seconds_total")) {
    work = work + 1;
  }
  EXPECT_EQ(ProcessValues().at("process_open_fds"), before.at("process_open_fds") + 2);
  for (int descriptor : descriptors) close(descriptor);
  EXPECT_EQ(ProcessValues().at("process_open_fds"), before.at("process_open_fds"));
}

TEST_F(ServerMetricsSpec, PartsOfAGaugeAddUp) {
  EXPECT_NE(metrics_.engine.AddPart(), metrics_.engine.AddPart());
  metrics_.engine.waiting.Set(0, 3);
  metrics_.engine.waiting.Set(2, 4);
  metrics_.engine.waiting.Set(0, 1);
  EXPECT_EQ(metrics_.engine.waiting.Value(), 5);
}

TEST_F(ServerMetricsSpec, VllmNamesCarryTheSameFigures) {
  metrics_.engine.waiting.Set(0, 3);
  metrics_.engine.running.Set(0, 1);
  metrics_.engine.queue_time.Observe(0.5);
  metrics_.engine.time_to_kv_ready.Observe(2);
  metrics_.engine.memory_budget.Set(1000);
  metrics_.kv.Held(Tier::kHost).Set(250);
  const VllmMetrics vllm(registry_, "m");
  const std::string text = prometheus::TextSerializer().Serialize(vllm.Collect());
  EXPECT_THAT(text, HasSubstr("vllm:num_requests_waiting{model_name=\"m\"} 3"));
  EXPECT_THAT(text, HasSubstr("vllm:num_requests_running{model_name=\"m\"} 1"));
  EXPECT_THAT(text,
              HasSubstr("vllm:request_queue_time_seconds_sum{model_name=\"m\"} 0.5"));
  EXPECT_THAT(text,
              HasSubstr("vllm:time_to_first_token_seconds_sum{model_name=\"m\"} 2"));
  EXPECT_THAT(text, HasSubstr("vllm:kv_cache_usage_perc{model_name=\"m\"} 0.25"));
}

TEST_F(ServerMetricsSpec, VllmCacheUsageWithoutABudgetIsZero) {
  const VllmMetrics vllm(registry_, "m");
  const std::string text = prometheus::TextSerializer().Serialize(vllm.Collect());
  EXPECT_THAT(text, HasSubstr("vllm:kv_cache_usage_perc{model_name=\"m\"} 0\n"));
}

}  // namespace
}  // namespace pbs::server
