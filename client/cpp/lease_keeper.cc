#include "client/cpp/lease_keeper.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/time/clock.h"

namespace pbs::client {

LeaseKeeper::LeaseKeeper(Client& client, v1::KvDescriptor kv, absl::Time deadline)
    : client_(client),
      ticket_(kv.lease().ticket()),
      deadline_(deadline),
      thread_([this, kv = std::move(kv)] { Run(kv); }) {}

LeaseKeeper::~LeaseKeeper() {
  end_.Notify();
  thread_.join();
}

CallTerms LeaseKeeper::Terms(absl::Duration half) const {
  return {.deadline = std::min(deadline_, absl::Now() + half)};
}

void LeaseKeeper::Run(absl::StatusOr<v1::KvDescriptor> kv) {
  absl::Duration half = absl::Seconds(kv->lease().ttl_seconds()) / 2;
  while (half > absl::ZeroDuration()) {
    absl::Status kept = kv.status();
    // While the prefill runs, the lease's time does not.
    if (kv.ok() && kv->state() == v1::COMPLETE) {
      kept = client_.Renew(ticket_, kv->lease().ttl_seconds(), Terms(half)).status();
    }
    if (absl::IsNotFound(kept)) return;  // the fetch ends of it, too
    const absl::Duration pause = kept.ok() ? half : half / 4;
    if (end_.WaitForNotificationWithTimeout(pause)) return;
    kv = client_.Describe(ticket_, Terms(half));
    if (kv.ok()) half = absl::Seconds(kv->lease().ttl_seconds()) / 2;
  }
}

}  // namespace pbs::client
