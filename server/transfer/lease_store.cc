#include "server/transfer/lease_store.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "pbs/check.h"
#include "server/base/random_id.h"
#include "server/base/status.h"

namespace pbs::server {
namespace {

constexpr size_t kDigestBytesMax = 128;  // of a digest that a message repeats

absl::Status CheckDigest(const char* name, const std::string& stated,
                         const std::string& held) {
  if (stated.empty() || stated == held) return absl::OkStatus();
  if (stated.size() > kDigestBytesMax) {
    return absl::FailedPreconditionError(
        absl::StrCat(name, " of the ticket has ", stated.size(), " bytes, more than ",
                     kDigestBytesMax, ", and is not the lease's ", held));
  }
  return absl::FailedPreconditionError(
      absl::StrCat(name, " ", stated, " of the ticket is not the lease's ", held));
}

}  // namespace

// ---- PendingLease

PendingLease& PendingLease::operator=(PendingLease&& other) noexcept {
  if (this != &other) {
    Abandon();
    store_ = std::exchange(other.store_, nullptr);
    ticket_ = std::move(other.ticket_);
  }
  return *this;
}

void PendingLease::Attach(std::shared_ptr<HeldKv> kv) {
  PBS_CHECK(valid());
  MutexLock lock(store_->mutex_);
  const auto entry = store_->leases_.find(ticket_.handle());
  PBS_CHECK(entry != store_->leases_.end());  // nobody has the ticket yet
  LeaseStore::Lease& lease = *entry->second;
  lease.bytes_to_export = kv->cache().shape().bytes() + kv->queries().bytes();
  store_->metrics_.export_outstanding.Increment(
      static_cast<double>(lease.bytes_to_export));
  lease.kv = std::move(kv);
}

absl::StatusOr<std::shared_ptr<const v1::Done>> PendingLease::Complete(
    v1::Done done, ByteReservation bytes) {
  PBS_CHECK(valid());
  LeaseStore* const store = std::exchange(store_, nullptr);
  MutexLock lock(store->mutex_);
  const auto entry = store->leases_.find(ticket_.handle());
  if (entry == store->leases_.end()) {
    return absl::AbortedError("the lease was released while its prefill ran");
  }
  LeaseStore::Lease& lease = *entry->second;
  store->StartTime(ticket_.handle(), lease);
  *done.mutable_ticket() = ticket_;
  done.set_lease_expires_unix_ms(absl::ToUnixMillis(lease.expires));
  lease.result_bytes = std::move(bytes);
  lease.done = std::make_shared<const v1::Done>(std::move(done));
  return lease.done;
}

void PendingLease::Abandon() {
  LeaseStore* const store = std::exchange(store_, nullptr);
  if (store != nullptr) store->Abandon(ticket_.handle());
}

// ---- LeaseStore

absl::Status LeaseStore::NotFound() {
  return absl::NotFoundError(
      "no lease has this ticket: it is unknown, expired or released");
}

LeaseStore::LeaseStore(const LeaseOptions& options, uint64_t epoch, const Clock& clock,
                       TimerQueue& timers, KvMetrics& metrics)
    : options_(options),
      epoch_(epoch),
      clock_(clock),
      timers_(timers),
      metrics_(metrics) {}

LeaseStore::~LeaseStore() {
  LeaseMap left;
  {
    MutexLock lock(mutex_);
    left.swap(leases_);
  }
  for (const auto& [handle, lease] : left) {
    timers_.Cancel(lease->timer);
    if (lease->kv != nullptr) lease->kv->Close(NotFound());
  }
}

void LeaseStore::SetEndpoint(std::string endpoint) {
  MutexLock lock(mutex_);
  endpoint_ = std::move(endpoint);
}

std::string LeaseStore::endpoint() const {
  MutexLock lock(mutex_);
  return endpoint_;
}

absl::StatusOr<int32_t> LeaseStore::CheckTtl(std::optional<int32_t> ttl_seconds) const {
  const int32_t ttl = ttl_seconds.value_or(options_.ttl_seconds_default);
  if (ttl < 1 || ttl > options_.ttl_seconds_max) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ttl_seconds ", ttl, " is outside [1, ", options_.ttl_seconds_max, "]"));
  }
  return ttl;
}

absl::StatusOr<BegunLease> LeaseStore::Begin(const LeaseRequest& request) {
  PBS_ABSL_ASSIGN_OR_RETURN(const int32_t ttl, CheckTtl(request.ttl_seconds));
  // The key's lease may be over although its timer has not run yet.
  ExpireKey(request.idempotency_key);
  MutexLock lock(mutex_);
  if (const auto key = handle_of_key_.find(request.idempotency_key);
      !request.idempotency_key.empty() && key != handle_of_key_.end()) {
    Lease& lease = *leases_.at(key->second);
    if (lease.request.fingerprint != request.fingerprint) {
      return absl::InvalidArgumentError(
          "idempotency_key is in use by a request that differs from this one");
    }
    if (lease.done == nullptr) {
      return absl::AbortedError(
          "the request with this idempotency_key is already running");
    }
    lease.ttl_seconds = ttl;
    StartTime(key->second, lease);
    BegunLease begun;
    begun.existing = MakeView(key->second, lease);
    return begun;
  }
  if (static_cast<int32_t>(leases_.size()) >= options_.leases_max) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "leases held ", leases_.size(), " reach leases_max ", options_.leases_max));
  }
  const std::string handle = RandomHandle();
  auto lease = std::make_shared<Lease>();
  lease->request = request;
  lease->ttl_seconds = ttl;
  if (!request.idempotency_key.empty()) {
    handle_of_key_.emplace(request.idempotency_key, handle);
  }
  BegunLease begun;
  begun.pending.store_ = this;
  begun.pending.ticket_ = MakeTicket(handle, *lease);
  leases_.emplace(handle, std::move(lease));
  metrics_.leases.Set(static_cast<double>(leases_.size()));
  return begun;
}

void LeaseStore::ExpireKey(const std::string& idempotency_key) {
  std::string handle;
  {
    MutexLock lock(mutex_);
    const auto key = handle_of_key_.find(idempotency_key);
    if (key == handle_of_key_.end()) return;
    handle = key->second;
  }
  Expire(handle);
}

absl::StatusOr<LeaseView> LeaseStore::Find(const v1::KvTicket& ticket) {
  MutexLock lock(mutex_);
  PBS_ABSL_ASSIGN_OR_RETURN(const auto entry, Locate(ticket));
  return MakeView(entry->first, *entry->second);
}

absl::StatusOr<LeaseView> LeaseStore::Renew(const v1::KvTicket& ticket,
                                            std::optional<int32_t> ttl_seconds) {
  MutexLock lock(mutex_);
  PBS_ABSL_ASSIGN_OR_RETURN(const auto entry, Locate(ticket));
  PBS_ABSL_ASSIGN_OR_RETURN(const int32_t ttl, CheckTtl(ttl_seconds));
  Lease& lease = *entry->second;
  lease.ttl_seconds = ttl;
  if (lease.done != nullptr) StartTime(entry->first, lease);
  return MakeView(entry->first, lease);
}

absl::Status LeaseStore::Release(const v1::KvTicket& ticket) {
  std::shared_ptr<Lease> removed;  // freed after the lock is released
  {
    MutexLock lock(mutex_);
    PBS_ABSL_ASSIGN_OR_RETURN(const auto entry, Locate(ticket));
    removed = Remove(entry);
  }
  removed->kv->Close(NotFound());
  NotifyIfEmpty();
  return absl::OkStatus();
}

void LeaseStore::MarkExported(const v1::KvTicket& ticket, int64_t bytes) {
  MutexLock lock(mutex_);
  const auto entry = Locate(ticket);
  if (!entry.ok()) return;
  Lease& lease = *(*entry)->second;
  const int64_t exported = std::min(bytes, lease.bytes_to_export);
  metrics_.export_outstanding.Decrement(static_cast<double>(exported));
  lease.bytes_to_export -= exported;
}

int64_t LeaseStore::size() const {
  MutexLock lock(mutex_);
  return static_cast<int64_t>(leases_.size());
}

void LeaseStore::WhenEmpty(absl::AnyInvocable<void()> callback) {
  {
    MutexLock lock(mutex_);
    when_empty_ = std::move(callback);
  }
  NotifyIfEmpty();
}

v1::KvTicket LeaseStore::MakeTicket(const std::string& handle,
                                    const Lease& lease) const {
  v1::KvTicket ticket;
  ticket.set_handle(handle);
  ticket.set_epoch(epoch_);
  ticket.set_model_digest(lease.request.model_digest);
  ticket.set_sparsity_digest(lease.request.sparsity_digest);
  ticket.set_endpoint(endpoint_);
  return ticket;
}

LeaseView LeaseStore::MakeView(const std::string& handle, const Lease& lease) const {
  return {MakeTicket(handle, lease),
          lease.request.model,
          lease.kv,
          lease.done,
          lease.expires,
          lease.ttl_seconds,
          lease.request.prompt_digest};
}

absl::StatusOr<LeaseStore::LeaseMap::iterator> LeaseStore::Locate(
    const v1::KvTicket& ticket) {
  if (ticket.epoch() != epoch_) return NotFound();
  const auto entry = leases_.find(ticket.handle());
  if (entry == leases_.end() || entry->second->kv == nullptr) return NotFound();
  // The timer may be late; the lease is over all the same.
  if (entry->second->expires <= clock_.Now()) return NotFound();
  const LeaseRequest& held = entry->second->request;
  PBS_ABSL_RETURN_IF_ERROR(
      CheckDigest("model_digest", ticket.model_digest(), held.model_digest));
  PBS_ABSL_RETURN_IF_ERROR(
      CheckDigest("sparsity_digest", ticket.sparsity_digest(), held.sparsity_digest));
  return entry;
}

void LeaseStore::StartTime(const std::string& handle, Lease& lease) {
  timers_.Cancel(lease.timer);
  lease.expires = clock_.Now() + absl::Seconds(lease.ttl_seconds);
  lease.timer = timers_.At(lease.expires, [this, handle] { Expire(handle); });
}

std::shared_ptr<LeaseStore::Lease> LeaseStore::Remove(LeaseMap::iterator entry) {
  std::shared_ptr<Lease> lease = std::move(entry->second);
  timers_.Cancel(lease->timer);
  handle_of_key_.erase(lease->request.idempotency_key);
  leases_.erase(entry);
  metrics_.leases.Set(static_cast<double>(leases_.size()));
  metrics_.export_outstanding.Decrement(static_cast<double>(lease->bytes_to_export));
  return lease;
}

void LeaseStore::Expire(const std::string& handle) {
  std::shared_ptr<Lease> removed;  // freed after the lock is released
  {
    MutexLock lock(mutex_);
    const auto entry = leases_.find(handle);
    if (entry == leases_.end()) return;
    if (entry->second->expires > clock_.Now()) return;  // renewed meanwhile
    metrics_.lease_expired.Increment();
    removed = Remove(entry);
  }
  removed->kv->Close(NotFound());
  NotifyIfEmpty();
}

void LeaseStore::Abandon(const std::string& handle) {
  std::shared_ptr<Lease> removed;  // freed after the lock is released
  {
    MutexLock lock(mutex_);
    const auto entry = leases_.find(handle);
    if (entry == leases_.end()) return;
    removed = Remove(entry);
  }
  if (removed->kv != nullptr) removed->kv->Abandon();
  NotifyIfEmpty();
}

void LeaseStore::NotifyIfEmpty() {
  absl::AnyInvocable<void()> callback;
  {
    MutexLock lock(mutex_);
    if (leases_.empty()) callback = std::move(when_empty_);
    when_empty_ = leases_.empty() ? nullptr : std::move(when_empty_);
  }
  if (callback) callback();
}

}  // namespace pbs::server
