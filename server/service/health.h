// grpc.health.v1.Health.
//
// It replaces gRPC's default health service. That one answers SERVING as soon as it
// listens, and its watchers delay a shutdown.
//
// Threading: safe from any thread. Memory: one entry per watcher, whose name has at
// most kRequestTextBytesMax bytes (a longer one is INVALID_ARGUMENT). The limit of
// HTTP/2 streams bounds the watchers.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include <grpcpp/grpcpp.h>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/base/mutex.h"
#include "server/service/task_pool.h"

namespace pbs::server {

class HealthWatch;

class HealthService final
    : public grpc::health::v1::Health::WithRawCallbackMethod_Check<
          grpc::health::v1::Health::WithRawCallbackMethod_Watch<
              grpc::health::v1::Health::Service>> {
 public:
  using Status = grpc::health::v1::HealthCheckResponse;

  explicit HealthService(TaskPool& movers) : movers_(movers) {}

  // Sets the status of a service, which is unknown before the first call.
  void Set(const std::string& service, bool serving);
  // Ends all watchers. Later watchers end at once.
  void EndWatches();

  // The status for Watch; SERVICE_UNKNOWN for a name that was never set.
  Status::ServingStatus Get(const std::string& service) const;

  // Number of calls so far.
  int64_t begun() const { return begun_; }

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Watch(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override;

 private:
  friend class HealthWatch;
  bool Add(HealthWatch* watch);  // false after EndWatches()
  void Remove(HealthWatch* watch);

  TaskPool& movers_;
  std::atomic<int64_t> begun_{0};
  mutable Mutex mutex_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<std::string, bool> serving_ ABSL_GUARDED_BY(mutex_);
  std::set<HealthWatch*> watches_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
