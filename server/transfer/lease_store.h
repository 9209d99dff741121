// Leases: who may fetch which held cache, and until when.
//
//   Begin -> Attach -> Complete -> (Find, Renew)* -> Release | expiry
//   (a prefill is running)        (its time runs)    (gone)
//
// A ticket is 128 random bits plus the process's epoch. Unknown, foreign, expired and
// released tickets are told apart by nobody: one NOT_FOUND, one message.
//
// Idempotency: a key names one piece of work while its lease lives. The same key with
// an equal request gives the lease that exists (ABORTED while its prefill still runs);
// with another request it is INVALID_ARGUMENT.
//
// Threading: safe from any thread. Expiry runs on the timer queue's thread, which must
// have stopped before the store is destroyed.
// Memory: at most leases_max entries. The caches are charged where they are allocated;
// the store drops its reference at once on release and expiry, and whoever still reads
// one sees `end` and lets go.
#pragma once

#include <atomic>
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
  std::optional<int32_t> ttl_seconds;  // counted from Complete()
  std::string idempotency_key;         // "" = none
  std::string fingerprint;             // equal requests have equal ones
};

// What became of a lease that somebody still reads.
enum class LeaseEnd : uint8_t {
  kNone,
  kGone,       // released or expired
  kAbandoned,  // its prefill ended early
};

// A lease as it was when asked for.
struct LeaseView {
  v1::KvTicket ticket;
  std::string model;
  std::shared_ptr<HeldKv> kv;            // shared: a reader outlives the lease
  std::shared_ptr<const v1::Done> done;  // null while the prefill runs
  absl::Time expires;                    // InfiniteFuture while it runs
  int32_t ttl_seconds = 0;
  // A reader looks at it and stops. Shared: it outlives the lease.
  std::shared_ptr<const std::atomic<LeaseEnd>> end;
};

class LeaseStore;

// A lease whose prefill runs. Dropped without Complete(), the lease is no more.
class PendingLease {
 public:
  PendingLease() = default;
  PendingLease(PendingLease&& other) noexcept { *this = std::move(other); }
  PendingLease& operator=(PendingLease&& other) noexcept;
  ~PendingLease() { Abandon(); }

  bool valid() const { return store_ != nullptr; }
  const v1::KvTicket& ticket() const { return ticket_; }
  // Released by its holder while the prefill runs.
  bool gone() const { return end_->load() != LeaseEnd::kNone; }

  // From here on the ticket finds the lease.
  void Attach(std::shared_ptr<HeldKv> kv);
  // Stores the result with ticket and expiry filled in, starts the lease's time and
  // returns what was stored. `bytes` are what the result costs; they live as long as
  // the lease. Aborted when the lease is gone.
  absl::StatusOr<std::shared_ptr<const v1::Done>> Complete(v1::Done done,
                                                           ByteReservation bytes);

 private:
  friend class LeaseStore;
  void Abandon();

  LeaseStore* store_ = nullptr;
  v1::KvTicket ticket_;
  std::shared_ptr<const std::atomic<LeaseEnd>> end_;
};

// Either a new lease or, by idempotency, one that is complete.
struct BegunLease {
  PendingLease pending;
  std::optional<LeaseView> existing;
};

class LeaseStore {
 public:
  // `epoch` tells this process from every other; not 0.
  LeaseStore(const LeaseOptions& options, uint64_t epoch, const Clock& clock,
             TimerQueue& timers, KvMetrics& metrics);
  ~LeaseStore();
  LeaseStore(const LeaseStore&) = delete;
  LeaseStore& operator=(const LeaseStore&) = delete;

  // What every ticket without a lease gets.
  static absl::Status NotFound();

  const LeaseOptions& options() const { return options_; }
  uint64_t epoch() const { return epoch_; }

  // InvalidArgument (ttl outside [1, ttl_seconds_max]; key in use by another request),
  // Aborted (the key's prefill runs), ResourceExhausted (leases_max held). An existing
  // lease is renewed for the request's ttl.
  absl::StatusOr<BegunLease> Begin(const LeaseRequest& request);

  // NotFound; FailedPrecondition when a digest that the ticket states is not the
  // lease's.
  absl::StatusOr<LeaseView> Find(const v1::KvTicket& ticket);
  // The lease ends `ttl_seconds` from now, or from Complete() while the prefill runs.
  // InvalidArgument as Begin(), else as Find().
  absl::StatusOr<LeaseView> Renew(const v1::KvTicket& ticket,
                                  std::optional<int32_t> ttl_seconds);
  // As Find(). After OK the ticket is NotFound.
  absl::Status Release(const v1::KvTicket& ticket);

  // `bytes` of the held cache were fetched: they no longer wait for export. What is
  // fetched twice counts twice; more than the cache is the cache.
  void MarkExported(const v1::KvTicket& ticket, int64_t bytes);

  int64_t size() const;
  // Calls `callback` once no lease is held; at once when none is. One at a time.
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
    std::shared_ptr<std::atomic<LeaseEnd>> end;
  };
  using LeaseMap = std::unordered_map<std::string, std::shared_ptr<Lease>>;

  v1::KvTicket MakeTicket(const std::string& handle, const Lease& lease) const;
  LeaseView MakeView(const std::string& handle, const Lease& lease) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<int32_t> CheckTtl(std::optional<int32_t> ttl_seconds) const;
  // The attached lease of `ticket`.
  absl::StatusOr<LeaseMap::iterator> Locate(const v1::KvTicket& ticket)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void StartTime(const std::string& handle, Lease& lease)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the lease out; the caller drops it after the lock is released.
  std::shared_ptr<Lease> Remove(LeaseMap::iterator entry, LeaseEnd end)
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
  LeaseMap leases_ ABSL_GUARDED_BY(mutex_);
  std::unordered_map<std::string, std::string> handle_of_key_ ABSL_GUARDED_BY(mutex_);
  absl::AnyInvocable<void()> when_empty_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
