// The values that metric labels may take. Labels come from these enums only, so that
// the number of series is fixed at build time.
//
// Threading: constants.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "pbs/attention.h"

namespace pbs::server {

// Label `rpc`.
enum class Rpc : uint8_t {
  kPrefill,
  kAttend,
  kDescribe,
  kFetch,
  kRenew,
  kRelease,
  kListModels,
  kGetServerInfo,
  kUnknown,  // a method that this server does not have
};
inline constexpr std::array<const char*, 9> kRpcNames = {
    "prefill", "attend",      "describe",        "fetch",  "renew",
    "release", "list_models", "get_server_info", "unknown"};

// Label `stage`: StageSeconds (types.proto) without `copy`, which only replies state.
enum class Stage : uint8_t {
  kQueue,
  kEmbed,
  kQkv,
  kPermute,
  kSelect,
  kAttend,
  kMlp,
  kSend,
};
inline constexpr std::array<const char*, 8> kStageNames = {
    "queue", "embed", "qkv", "permute", "select", "attend", "mlp", "send"};

// Label `reason` of refusals: no work was done.
enum class RejectReason : uint8_t {
  kQueueFull,
  kMemory,    // does not fit the memory budget now
  kTooLarge,  // could never fit it
  kDeadline,  // passed, or cannot be met
  kUploads,   // too many uploads under way
  kLeases,    // too many leases held
  kLoading,
  kDraining,
};
inline constexpr std::array<const char*, 8> kRejectReasonNames = {
    "queue_full", "memory", "too_large", "deadline",
    "uploads",    "leases", "loading",   "draining"};

// Label `reason` of work thrown away.
enum class WasteReason : uint8_t {
  kCancelled,  // the caller went away, or took nothing
  kDeadline,   // its deadline passed
  kError,
  kShutdown,  // the server stopped
};
inline constexpr std::array<const char*, 4> kWasteReasonNames = {
    "cancelled", "deadline", "error", "shutdown"};

// Label `reason` of transfers that had begun and ended early.
enum class TransferFailure : uint8_t {
  kCancelled,      // the consumer went away, or took nothing
  kLeaseGone,      // released or expired under the transfer
  kPrefillFailed,  // the cache will never be complete
  kDeadline,       // the consumer's deadline passed
  kShutdown,       // the server stopped
  kSink,           // the sink of a push failed, or was not reached
};
inline constexpr std::array<const char*, 6> kTransferFailureNames = {
    "cancelled", "lease_gone", "prefill_failed", "deadline", "shutdown", "sink"};

// Label `result` of requests for the shared memory of a cache.
enum class RegionResult : uint8_t {
  kOk,
  kNotFound,    // no lease has the ticket
  kForeign,     // a process of another user
  kBadRequest,  // not a request, or too long
  kTimeout,     // no whole request in time
  kError,       // no descriptor to give, or the peer has gone
};
inline constexpr std::array<const char*, 6> kRegionResultNames = {
    "ok", "not_found", "foreign", "bad_request", "timeout", "error"};

// Label `tier` of held caches.
enum class Tier : uint8_t { kHost };
inline constexpr std::array<const char*, 1> kTierNames = {"host"};

// Label `code`: the canonical names, indexed by code value.
inline constexpr std::array<const char*, 17> kCodeNames = {"OK",
                                                           "CANCELLED",
                                                           "UNKNOWN",
                                                           "INVALID_ARGUMENT",
                                                           "DEADLINE_EXCEEDED",
                                                           "NOT_FOUND",
                                                           "ALREADY_EXISTS",
                                                           "PERMISSION_DENIED",
                                                           "RESOURCE_EXHAUSTED",
                                                           "FAILED_PRECONDITION",
                                                           "ABORTED",
                                                           "OUT_OF_RANGE",
                                                           "UNIMPLEMENTED",
                                                           "INTERNAL",
                                                           "UNAVAILABLE",
                                                           "DATA_LOSS",
                                                           "UNAUTHENTICATED"};

// Label `method`, indexed by pbs::Method.
inline const auto kMethodNames = [] {
  std::array<const char*, kMethods.size()> names{};
  for (Method method : kMethods)
    names[static_cast<size_t>(method)] = MethodName(method);
  return names;
}();

}  // namespace pbs::server
