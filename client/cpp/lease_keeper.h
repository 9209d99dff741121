// Keeps a lease while its cache is fetched: a fetch may take longer than the lease has
// left. The lease keeps the time that it was given, also when somebody else renews it
// meanwhile.
//
// Threading: a thread of its own, which the destructor ends; it waits for a reply that
// is on its way. Memory: none to speak of.
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
  // Renews the lease that was described as `kv` now and whenever half of its time is
  // over. `client` must outlive this; no call takes longer than that or `deadline`.
  LeaseKeeper(Client& client, v1::KvDescriptor kv, absl::Time deadline);
  ~LeaseKeeper();
  LeaseKeeper(const LeaseKeeper&) = delete;
  LeaseKeeper& operator=(const LeaseKeeper&) = delete;

 private:
  void Run(absl::StatusOr<v1::KvDescriptor> kv);
  // Of a call that has to be over before the lease is.
  CallTerms Terms(absl::Duration half) const;

  Client& client_;
  const v1::KvTicket ticket_;
  const absl::Time deadline_;
  absl::Notification end_;
  std::thread thread_;  // last: it reads what is above
};

}  // namespace pbs::client
