// PushTargets: the addresses to which the server may push caches, each with one channel
// that all its pushes share.
//
// Threading: safe from any thread. Memory: at most one channel per target, made when it
// is first used and closed with this object.
#pragma once

#include <grpcpp/channel.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/base/mutex.h"
#include "server/service/options.h"

namespace pbs::server {

// A sink must have taken the first message of a push after this time.
inline constexpr absl::Duration kPushConnectMax = absl::Seconds(5);

class PushTargets {
 public:
  // `targets` are host:port, as ParseHostPort() reads it.
  PushTargets(const std::vector<std::string>& targets,
              const TransportOptions& transport);

  // The channel to one of the targets. It connects when a call needs it, resolves the
  // name at every connection, and uses no proxy.
  std::shared_ptr<grpc::Channel> ChannelTo(const std::string& target);

 private:
  const TransportOptions transport_;
  Mutex mutex_;
  // Null until used
  std::map<std::string, std::shared_ptr<grpc::Channel>> channels_
      ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
