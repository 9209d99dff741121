// Name and HELP of every metric. docs/OPERATIONS.md has the same sentences;
// tests/structure/check_docs.py compares them.
//
// Threading: constants.
#pragma once

namespace pbs::server {

struct MetricName {
  const char* name;
  const char* help;
};

// ---- admission, queue, execution

inline constexpr MetricName kRequestsName = {"pbs_requests_total", "Calls that ended"};
inline constexpr MetricName kUnreadName = {
    "pbs_requests_unread_total",
    "Calls that ended before their request was read: gRPC refused them, or the caller "
    "left"};
inline constexpr MetricName kRejectedName = {
    "pbs_requests_rejected_total", "Requests that were refused before any work"};
inline constexpr MetricName kRunningName = {
    "pbs_requests_running", "Requests that have started and not finished"};
inline constexpr MetricName kWaitingName = {"pbs_requests_waiting",
                                            "Requests that wait in a queue"};
inline constexpr MetricName kBacklogTokensName = {
    "pbs_prefill_backlog_tokens", "Prompt tokens that were admitted and are not done"};
inline constexpr MetricName kBacklogSecondsName = {
    "pbs_prefill_backlog_seconds", "Predicted time until all admitted work is done"};
inline constexpr MetricName kQueueTimeName = {"pbs_request_queue_time_seconds",
                                              "Time from admission to the first step"};
inline constexpr MetricName kPrefillTimeName = {
    "pbs_request_prefill_time_seconds",
    "Time from the first step of a finished prefill to its last"};
inline constexpr MetricName kFirstLayerName = {
    "pbs_time_to_first_layer_seconds", "Time from admission to the first layer's KV"};
inline constexpr MetricName kKvReadyName = {
    "pbs_time_to_kv_ready_seconds",
    "Time from admission to the last layer's KV and the first token"};
inline constexpr MetricName kStageTimeName = {
    "pbs_stage_time_seconds", "Time of one stage of a finished request"};
inline constexpr MetricName kBatchName = {"pbs_prefill_batch_requests",
                                          "Prompts that shared a run"};
inline constexpr MetricName kPromptTokensName = {"pbs_prompt_tokens_total",
                                                 "Prompt tokens of finished prefills"};
inline constexpr MetricName kThresholdLoweredName = {
    "pbs_prefill_threshold_lowered_total",
    "Prefills that were admitted with a lower threshold, to meet their deadline"};
inline constexpr MetricName kTokensWastedName = {
    "pbs_prefill_tokens_wasted_total", "Prompt tokens whose work was thrown away"};

// ---- attention

inline constexpr MetricName kDensityName = {
    "pbs_attention_density_ratio",
    "Blocks that one attention computed, over those of dense attention on the same "
    "tiles"};
inline constexpr MetricName kCoverageName = {
    "pbs_attention_coverage_ratio",
    "Exact attention mass inside the selected blocks, mean over a request's sampled "
    "rows"};
inline constexpr MetricName kFlopsComputedName = {
    "pbs_attention_flops_computed_total", "Floating-point operations of attention"};
inline constexpr MetricName kFlopsDenseName = {
    "pbs_attention_flops_dense_total",
    "Floating-point operations of dense attention on the same tiles"};

// ---- memory and devices

inline constexpr MetricName kMemoryBudgetName = {"pbs_memory_budget_bytes",
                                                 "Bytes that admission may charge"};
inline constexpr MetricName kMemoryChargedName = {"pbs_memory_charged_bytes",
                                                  "Bytes that admission has charged"};
inline constexpr MetricName kDeviceMemoryName = {
    "pbs_device_memory_charged_bytes",
    "Bytes of a device that admission has charged, weights apart"};
inline constexpr MetricName kDeviceBacklogName = {
    "pbs_device_backlog_seconds", "Predicted time of the work that a device was given"};
inline constexpr MetricName kDeviceProgressName = {
    "pbs_device_progress_age_seconds",
    "Time since a step of a device's work last ended; 0 without work"};

// ---- caches and their transfer

inline constexpr MetricName kKvHeldName = {"pbs_kv_held_bytes",
                                           "Bytes of all KV caches"};
inline constexpr MetricName kLeasesName = {"pbs_kv_leases", "Leases that are held"};
inline constexpr MetricName kLeaseExpiredName = {"pbs_kv_lease_expired_total",
                                                 "Leases that ended by their time"};
inline constexpr MetricName kTransferBytesName = {
    "pbs_kv_transfer_bytes_total",
    "KV payload and scales that were handed to the transport"};
inline constexpr MetricName kTransferTimeName = {
    "pbs_kv_transfer_time_seconds",
    "Time of one KV transfer from its first chunk to its last"};
inline constexpr MetricName kTransferFailuresName = {
    "pbs_kv_transfer_failures_total", "KV transfers that had begun and ended early"};
inline constexpr MetricName kRegionRequestsName = {
    "pbs_kv_shared_memory_requests_total",
    "Requests at shared_memory_socket for the memory of a cache"};
inline constexpr MetricName kExportOutstandingName = {
    "pbs_kv_export_outstanding_bytes",
    "KV bytes that are held and in no finished fetch yet"};

// ---- what runs

inline constexpr MetricName kBuildInfoName = {"pbs_build_info",
                                              "Version of the server; always 1"};
inline constexpr MetricName kBackendInfoName = {
    "pbs_backend_info", "Backend that runs attention; always 1"};
inline constexpr MetricName kProcessMemoryName = {"process_resident_memory_bytes",
                                                  "Resident memory"};
inline constexpr MetricName kProcessCpuName = {"process_cpu_seconds_total",
                                               "CPU time, user and system"};
inline constexpr MetricName kProcessStartName = {
    "process_start_time_seconds", "Start of the process, in seconds since 1970"};
inline constexpr MetricName kProcessDescriptorsName = {"process_open_fds",
                                                       "Open file descriptors"};
inline constexpr MetricName kProcessDescriptorsMaxName = {
    "process_max_fds", "Limit of open file descriptors"};

// ---- under vLLM's names, for its readers; the HELP is that of our own metric

inline constexpr const char* kVllmWaitingName = "vllm:num_requests_waiting";
inline constexpr const char* kVllmRunningName = "vllm:num_requests_running";
inline constexpr const char* kVllmQueueTimeName = "vllm:request_queue_time_seconds";
inline constexpr const char* kVllmFirstTokenName = "vllm:time_to_first_token_seconds";
inline constexpr MetricName kVllmCacheUsageName = {"vllm:kv_cache_usage_perc",
                                                   "Share of the KV cache in use"};

}  // namespace pbs::server
