// The metrics that the server counts. sampled_metrics.h and process_metrics.h have the
// metrics that are computed when they are scraped. metric_names.h has the names.
// docs/OPERATIONS.md states which alert, panel or decision uses each.
//
// Units are seconds and bytes. Handles are resolved once, at construction, so that the
// hot path does one atomic addition and no lookup.
//
// Threading: construct once; handles are safe from any thread.
// Memory: fixed at construction; labels come from labels.h only.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "pbs/attention.h"
#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "server/telemetry/labels.h"
#include "server/telemetry/summed_gauge.h"

namespace pbs::server {

// One metric per value of a label.
template <class Metric, size_t kSize>
using PerLabel = std::array<Metric*, kSize>;

// Admission, queue and execution.
struct EngineMetrics {
  explicit EngineMetrics(prometheus::Registry& registry);

  // pbs_request_queue_time_seconds: from admission to the first step.
  prometheus::Histogram& queue_time;
  // pbs_request_prefill_time_seconds: time of a finished prefill from its first step to
  // its last.
  prometheus::Histogram& prefill_time;
  // pbs_time_to_first_layer_seconds: from admission to the first layer's KV.
  prometheus::Histogram& time_to_first_layer;
  // pbs_time_to_kv_ready_seconds: from admission to the last layer's KV and the first
  // token.
  prometheus::Histogram& time_to_kv_ready;
  // pbs_attention_coverage_ratio: exact attention mass that the selected blocks hold,
  // mean over the sampled rows of a request.
  prometheus::Histogram& coverage;

  // pbs_prefill_batch_requests: prompts that shared a run.
  prometheus::Histogram& batch_requests;

  // pbs_attention_flops_computed_total, pbs_attention_flops_dense_total: the FLOPs of
  // attention, and those of dense attention on the same prompts.
  prometheus::Counter& flops_computed;
  prometheus::Counter& flops_dense;
  // pbs_prompt_tokens_total: prompt tokens of finished prefills.
  prometheus::Counter& prompt_tokens;
  // pbs_prefill_threshold_lowered_total: prefills that were admitted with a lower
  // threshold than they asked for.
  prometheus::Counter& threshold_lowered;

  // Identifies an executor; the gauges sum over all executors.
  using Part = size_t;
  Part AddPart() { return num_parts_++; }

  // pbs_requests_running: started and not finished. pbs_requests_waiting: queued.
  SummedGauge running;
  SummedGauge waiting;
  // pbs_prefill_backlog_tokens, pbs_prefill_backlog_seconds: prompt tokens admitted and
  // not finished, and the predicted time until all admitted work is done.
  SummedGauge backlog_tokens;
  SummedGauge backlog_seconds;
  // pbs_memory_budget_bytes: bytes that admission may charge. pbs_memory_charged_bytes:
  // bytes that it has charged, read at every scrape (SampledGauge).
  prometheus::Gauge& memory_budget;

  // pbs_stage_time_seconds{stage}: stage times of a finished request; stages that did
  // not run are not observed. `send` is the time of an Attend's reply, an inline cache
  // or a fetch from its first message to its last.
  prometheus::Histogram& StageTime(Stage stage) const {
    return *stage_time_[static_cast<size_t>(stage)];
  }
  // pbs_attention_density_ratio{method}: AttentionStats::Density() of one attention;
  // `method` is the method that ran.
  prometheus::Histogram& Density(Method method) const {
    return *density_[static_cast<size_t>(method)];
  }
  // pbs_prefill_tokens_wasted_total{reason}: prompt tokens times the share of the
  // prefill's layers that had run when the prefill was dropped.
  prometheus::Counter& TokensWasted(WasteReason reason) const {
    return *tokens_wasted_[static_cast<size_t>(reason)];
  }
  // pbs_requests_rejected_total{reason}: refused before any work was done.
  prometheus::Counter& Rejected(RejectReason reason) const {
    return *rejected_[static_cast<size_t>(reason)];
  }

 private:
  std::atomic<Part> num_parts_ = 0;
  PerLabel<prometheus::Histogram, kStageNames.size()> stage_time_;
  PerLabel<prometheus::Histogram, kMethods.size()> density_;
  PerLabel<prometheus::Counter, kWasteReasonNames.size()> tokens_wasted_;
  PerLabel<prometheus::Counter, kRejectReasonNames.size()> rejected_;
};

// Caches that are held for the decode tier, and their transfer.
struct KvMetrics {
  explicit KvMetrics(prometheus::Registry& registry);

  // pbs_kv_leases: held now. pbs_kv_lease_expired_total: freed by time, not by release.
  prometheus::Gauge& leases;
  prometheus::Counter& lease_expired;
  // pbs_kv_transfer_bytes_total, pbs_kv_transfer_time_seconds: KV payload bytes passed
  // to the transport, inline, by fetch or by push, and the time of one transfer from
  // its first chunk to its last.
  prometheus::Counter& transfer_bytes;
  prometheus::Histogram& transfer_time;
  // pbs_kv_export_outstanding_bytes: held KV bytes that no finished fetch has covered.
  // The decode tier is scaled by it.
  prometheus::Gauge& export_outstanding;

  // pbs_kv_held_bytes{tier}: bytes of all held caches, unfinished ones included.
  prometheus::Gauge& Held(Tier tier) const { return *held_[static_cast<size_t>(tier)]; }
  // pbs_kv_transfer_failures_total{reason}: transfers that had begun and ended early.
  prometheus::Counter& TransferFailed(TransferFailure reason) const {
    return *transfer_failures_[static_cast<size_t>(reason)];
  }
  // pbs_kv_shared_memory_requests_total{result}: at shared_memory_socket.
  prometheus::Counter& RegionRequests(RegionResult result) const {
    return *region_requests_[static_cast<size_t>(result)];
  }

 private:
  PerLabel<prometheus::Gauge, kTierNames.size()> held_;
  PerLabel<prometheus::Counter, kTransferFailureNames.size()> transfer_failures_;
  PerLabel<prometheus::Counter, kRegionResultNames.size()> region_requests_;
};

// Remote procedure calls.
struct RpcMetrics {
  explicit RpcMetrics(prometheus::Registry& registry);

  // pbs_requests_unread_total: calls that never reached our code
  // (service/unread_calls.h).
  prometheus::Counter& unread;

  // pbs_requests_total{rpc,code}: finished calls. A code outside the canonical ones
  // counts as UNKNOWN.
  prometheus::Counter& Requests(Rpc rpc, absl::StatusCode code) const;

 private:
  std::array<PerLabel<prometheus::Counter, kCodeNames.size()>, kRpcNames.size()>
      requests_;
};

struct BuildLabels {
  std::string version;
  std::string commit;
};
struct BackendLabels {
  std::string backend;  // "cpu"
  std::string isa;      // "avx512"
  std::string device;   // "Intel(R) Xeon(R) Processor, 16 threads"
};

struct ServerMetrics {
  explicit ServerMetrics(prometheus::Registry& registry)
      : engine(registry), kv(registry), rpc(registry), registry_(registry) {}

  EngineMetrics engine;
  KvMetrics kv;
  RpcMetrics rpc;

  // pbs_build_info{version,commit} and pbs_backend_info{backend,isa,device}: always 1.
  void SetBuildInfo(const BuildLabels& labels);
  void SetBackendInfo(const BackendLabels& labels);

 private:
  prometheus::Registry& registry_;
};

// Bucket bounds. Times: 1/64 ms, doubling up to 4194 s. Ratios: steps of .05 up to 1.
// Coverage: finer near 1.
const prometheus::Histogram::BucketBoundaries& TimeBuckets();
const prometheus::Histogram::BucketBoundaries& CountBuckets();  // 1 doubling to 256
const prometheus::Histogram::BucketBoundaries& RatioBuckets();
const prometheus::Histogram::BucketBoundaries& CoverageBuckets();

}  // namespace pbs::server
