// Renews a lease while its cache is fetched, because a fetch may take longer than the
// lease lives. Every renewal is for the lease's own time to live, also when another
// holder renews it meanwhile.
//
// Threading: one thread of its own. The destructor ends it and waits for a pending
// reply. Memory: O(1).
#pragma once

#include <thread>

#include "absl/status/statusor.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "client/cpp/client.h"
#include "pbs/v1/kv.pb.h"

namespace pbs::client {

class LeaseKeeper {
 public:
  // Renews the lease that `kv` describes, first at once and then whenever half of its
  // time has passed. No call takes longer than half of that time or passes `deadline`.
  // `client` must outlive this.
  LeaseKeeper(Client& client, v1::KvDescriptor kv, absl::Time deadline);
  ~LeaseKeeper();
  LeaseKeeper(const LeaseKeeper&) = delete;
  LeaseKeeper& operator=(const LeaseKeeper&) = delete;

 private:
  void Run(absl::StatusOr<v1::KvDescriptor> kv);
  // Terms of a call that must end before the lease does.
  CallTerms Terms(absl::Duration half) const;

  Client& client_;
  const v1::KvTicket ticket_;
  const absl::Time deadline_;
  absl::Notification end_;
  std::thread thread_;  // last: it reads what is above
};

}  // namespace pbs::client
