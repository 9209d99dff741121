// Leases: a ticket gives its holder the right to fetch one held cache for a limited
// time.
//
//   Begin -> Attach -> Complete -> (Find, Renew)* -> Release | expiry
//   (a prefill is running)        (its time runs)    (gone)
//
// A ticket is 128 random bits plus the process's epoch. Unknown, foreign, expired and
// released tickets all give the same NOT_FOUND with the same message, so that a client
// cannot tell them apart.
//
// Idempotency: a key names one piece of work while its lease lives. The same key with
// an equal request gives the lease that exists (ABORTED while its prefill still runs);
// with another request it is INVALID_ARGUMENT.
//
// Threading: safe from any thread. Expiry runs on the timer queue's thread, which must
// have stopped before the store is destroyed.
// Memory: at most leases_max entries. A cache is charged where it is allocated. On
// release and expiry the store closes the cache and drops its reference at once;
// readers learn of it and drop theirs.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pbs/v1/kv.pb.h"
#include "pbs/v1/prefill.pb.h"
#include "server/base/clock.h"
#include "server/base/mutex.h"
#include "server/base/timers.h"
#include "server/engine/byte_ledger.h"
#include "server/engine/held_kv.h"
#include "server/telemetry/server_metrics.h"

namespace pbs::server {

struct LeaseOptions {
  int32_t ttl_seconds_default = 60;
  int32_t ttl_seconds_max = 600;
  int32_t leases_max = 1024;
};

struct LeaseRequest {
  std::string model;
  std::string model_digest;
  std::string sparsity_digest;
  std::string prompt_digest;
  std::optional<int32_t> ttl_seconds;  // counted from Complete()
  std::string idempotency_key;         // "" = none
  std::string fingerprint;             // equal requests have equal ones
};

// A snapshot of a lease.
struct LeaseView {
  v1::KvTicket ticket;
  std::string model;
  std::shared_ptr<HeldKv> kv;            // shared: a reader may outlive the lease
  std::shared_ptr<const v1::Done> done;  // null while the prefill runs
  absl::Time expires;                    // InfiniteFuture while it runs
  int32_t ttl_seconds = 0;
  std::string prompt_digest;
};

class LeaseStore;

// A lease whose prefill runs. Destroying it without Complete() ends the lease.
class PendingLease {
 public:
  PendingLease() = default;
  PendingLease(PendingLease&& other) noexcept { *this = std::move(other); }
  PendingLease& operator=(PendingLease&& other) noexcept;
  ~PendingLease() { Abandon(); }

  bool valid() const { return store_ != nullptr; }
  const v1::KvTicket& ticket() const { return ticket_; }

  // From here on the ticket finds the lease. Its end, also while the prefill runs,
  // closes `kv` with NotFound().
  void Attach(std::shared_ptr<HeldKv> kv);
  // Stores the result with ticket and expiry filled in, starts the lease's time and
  // returns what was stored. `bytes` is the charge for the result, held as long as the
  // lease. Aborted when the lease has ended.
  absl::StatusOr<std::shared_ptr<const v1::Done>> Complete(v1::Done done,
                                                           ByteReservation bytes);

 private:
  friend class LeaseStore;
  void Abandon();

  LeaseStore* store_ = nullptr;
  v1::KvTicket ticket_;
};

// Either a new lease or, by its idempotency key, an existing complete one.
struct BegunLease {
  PendingLease pending;
  std::optional<LeaseView> existing;
};

class LeaseStore {
 public:
  // `epoch` identifies this process; not 0.
  LeaseStore(const LeaseOptions& options, uint64_t epoch, const Clock& clock,
             TimerQueue& timers, KvMetrics& metrics);
  ~LeaseStore();
  LeaseStore(const LeaseStore&) = delete;
  LeaseStore& operator=(const LeaseStore&) = delete;

  // The status for every ticket without a lease.
  static absl::Status NotFound();

  const LeaseOptions& options() const { return options_; }
  uint64_t epoch() const { return epoch_; }

  // Where decode tiers reach the leases: KvTicket.endpoint of later tickets.
  void SetEndpoint(std::string endpoint);
  std::string endpoint() const;

  // InvalidArgument (ttl outside [1, ttl_seconds_max]; key in use by another request),
  // Aborted (the key's prefill runs), ResourceExhausted (leases_max held). An existing
  // lease is renewed for the request's ttl.
  absl::StatusOr<BegunLease> Begin(const LeaseRequest& request);

  // NotFound without a lease; FailedPrecondition when a digest in the ticket differs
  // from the lease's.
  absl::StatusOr<LeaseView> Find(const v1::KvTicket& ticket);
  // The lease ends `ttl_seconds` from now, or from Complete() while the prefill runs.
  // InvalidArgument as Begin(), else as Find().
  absl::StatusOr<LeaseView> Renew(const v1::KvTicket& ticket,
                                  std::optional<int32_t> ttl_seconds);
  // As Find(). After OK the ticket is NotFound.
  absl::Status Release(const v1::KvTicket& ticket);

  // Notes that `bytes` of the held cache were fetched, so that they no longer count as
  // outstanding. Bytes that are fetched twice count twice, up to the size of the cache.
  void MarkExported(const v1::KvTicket& ticket, int64_t bytes);

  int64_t size() const;
  // Calls `callback` once no lease is held; at once when none is. One callback at a
  // time.
  void WhenEmpty(absl::AnyInvocable<void()> callback);

 private:
  friend class PendingLease;
  struct Lease {
    LeaseRequest request;
    int32_t ttl_seconds = 0;
    std::shared_ptr<HeldKv> kv;
    std::shared_ptr<const v1::Done> done;
    ByteReservation result_bytes;
    absl::Time expires = absl::InfiniteFuture();
    TimerId timer = 0;
    int64_t bytes_to_export = 0;
  };
  using LeaseMap = std::unordered_map<std::string, std::shared_ptr<Lease>>;

  v1::KvTicket MakeTicket(const std::string& handle, const Lease& lease) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  LeaseView MakeView(const std::string& handle, const Lease& lease) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<int32_t> CheckTtl(std::optional<int32_t> ttl_seconds) const;
  // The attached lease of `ticket`.
  absl::StatusOr<LeaseMap::iterator> Locate(const v1::KvTicket& ticket)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void StartTime(const std::string& handle, Lease& lease)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Removes and returns the lease; the caller closes its cache and destroys it after it
  // has released the lock, because readers may call back.
  std::shared_ptr<Lease> Remove(LeaseMap::iterator entry)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Expire(const std::string& handle);
  void Abandon(const std::string& handle);
  void ExpireKey(const std::string& idempotency_key);
  void NotifyIfEmpty();

  const LeaseOptions options_;
  const uint64_t epoch_;
  const Clock& clock_;
  TimerQueue& timers_;
  KvMetrics& metrics_;
  mutable Mutex mutex_;
  std::string endpoint_ ABSL_GUARDED_BY(mutex_);
  LeaseMap leases_ ABSL_GUARDED_BY(mutex_);
  std::unordered_map<std::string, std::string> handle_of_key_ ABSL_GUARDED_BY(mutex_);
  absl::AnyInvocable<void()> when_empty_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
