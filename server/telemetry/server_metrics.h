// The metrics that the server counts; sampled_metrics.h and process_metrics.h have
// those that are looked at when they are scraped. Their names are in metric_names.h.
// docs/OPERATIONS.md says which alert, panel or decision uses each.
//
// Units are seconds and bytes. Handles resolve once, at construction: the hot path does
// one atomic addition and no lookup.
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
  // pbs_request_prefill_time_seconds: of a finished prefill, from its first step to its
  // last.
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

  // pbs_attention_flops_computed_total, pbs_attention_flops_dense_total: what attention
  // did, and what dense attention would have done.
  prometheus::Counter& flops_computed;
  prometheus::Counter& flops_dense;
  // pbs_prompt_tokens_total: of finished prefills.
  prometheus::Counter& prompt_tokens;

  // One for every executor; their queues add up.
  using Part = size_t;
  Part AddPart() { return num_parts_++; }

  // pbs_requests_running: started and not finished. pbs_requests_waiting: queued.
  SummedGauge running;
  SummedGauge waiting;
  // pbs_prefill_backlog_tokens, pbs_prefill_backlog_seconds: prompt tokens admitted and
  // not finished, and the predicted time until all admitted work is done.
  SummedGauge backlog_tokens;
  SummedGauge backlog_seconds;
  // pbs_memory_budget_bytes: what admission may charge. pbs_memory_charged_bytes: what
  // it has charged, looked at when scraped (SampledGauge).
  prometheus::Gauge& memory_budget;

  // pbs_stage_time_seconds{stage}: of a finished request; stages that did not run are
  // not observed. `send`: of an Attend's reply, an inline cache or a fetch, from its
  // first message to its last.
  prometheus::Histogram& StageTime(Stage stage) const {
    return *stage_time_[static_cast<size_t>(stage)];
  }
  // pbs_attention_density_ratio{method}: AttentionStats::Density() of one attention;
  // `method` is what ran.
  prometheus::Histogram& Density(Method method) const {
    return *density_[static_cast<size_t>(method)];
  }
  // pbs_prefill_tokens_wasted_total{reason}: prompt tokens times the share of the
  // prefill's layers that had run when it was thrown away.
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
  PerLabel<prometheus::Histogram, kMethodNames.size()> density_;
  PerLabel<prometheus::Counter, kWasteReasonNames.size()> tokens_wasted_;
  PerLabel<prometheus::Counter, kRejectReasonNames.size()> rejected_;
};

// Caches held for the decode tier and their transfer.
struct KvMetrics {
  explicit KvMetrics(prometheus::Registry& registry);

  // pbs_kv_leases: held now. pbs_kv_lease_expired_total: freed by time, not by release.
  prometheus::Gauge& leases;
  prometheus::Counter& lease_expired;
  // pbs_kv_transfer_bytes_total, pbs_kv_transfer_time_seconds: KV payload handed to the
  // transport, inline or by fetch, and the time of one transfer from its first chunk to
  // its last.
  prometheus::Counter& transfer_bytes;
  prometheus::Histogram& transfer_time;
  // pbs_kv_export_outstanding_bytes: KV bytes that are held and that no finished fetch
  // has covered. The signal to scale the decode tier by.
  prometheus::Gauge& export_outstanding;

  // pbs_kv_held_bytes{tier}: of all caches, under construction included.
  prometheus::Gauge& Held(Tier tier) const { return *held_[static_cast<size_t>(tier)]; }
  // pbs_kv_transfer_failures_total{reason}: transfers that had begun and ended early.
  prometheus::Counter& TransferFailed(TransferFailure reason) const {
    return *transfer_failures_[static_cast<size_t>(reason)];
  }

 private:
  PerLabel<prometheus::Gauge, kTierNames.size()> held_;
  PerLabel<prometheus::Counter, kTransferFailureNames.size()> transfer_failures_;
};

// Remote procedure calls.
struct RpcMetrics {
  explicit RpcMetrics(prometheus::Registry& registry);

  // pbs_requests_unread_total: calls that never reached us (service/unread_calls.h).
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

// Bucket bounds: 1/64 ms doubling to 4194 s; ratios in steps of .05 to 1; coverage with
// its interest near 1.
const prometheus::Histogram::BucketBoundaries& TimeBuckets();
const prometheus::Histogram::BucketBoundaries& CountBuckets();  // 1 doubling to 256
const prometheus::Histogram::BucketBoundaries& RatioBuckets();
const prometheus::Histogram::BucketBoundaries& CoverageBuckets();

}  // namespace pbs::server
