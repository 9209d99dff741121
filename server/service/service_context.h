// What every call of the service shares.
//
// Threading: safe from any thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <grpcpp/server_context.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/block_cache.h"
#include "server/engine/served_model.h"
#include "server/service/call_deadline.h"
#include "server/service/open_calls.h"
#include "server/service/options.h"
#include "server/service/parts.h"
#include "server/service/task_pool.h"
#include "server/service/uploads.h"

namespace pbs::server {

// Freed tensors that are kept for the next upload: at most this, and an eighth of the
// ledger.
inline constexpr int64_t kUploadBlockBytesMax = int64_t{512} << 20;

class ServiceContext {
 public:
  ServiceContext(const ServiceOptions& service_options,
                 const ServiceParts& service_parts)
      : options(service_options), parts(service_parts) {}

  const ServiceOptions options;
  const ServiceParts parts;
  // shared_ptr: what is on its way to a device may outlive the service.
  const std::shared_ptr<BlockCache> upload_blocks = std::make_shared<BlockCache>(
      std::min(kUploadBlockBytesMax, parts.ledger.bytes_max() / 8));
  OpenCalls open_calls;
  Uploads uploads{options.limits.upload_requests_max};
  TaskPool movers{2};      // make chunks when the executor has published something
  TaskPool background{1};  // generators and checks that take longer than a call may

  // Unavailable while models are loading; InvalidArgument when the call's metadata is
  // larger than transport.metadata_bytes_max.
  absl::Status CheckReady(const grpc::CallbackServerContext& call) const;
  // CheckReady(), and Unavailable while draining. Counts refusals for load.
  absl::Status CheckAdmitting(const grpc::CallbackServerContext& call) const;
  // Uploads::Take(), with refusals counted.
  absl::StatusOr<Uploads::Slot> TakeUploadSlot(Uploads::End end);

  // Why gRPC ends a call of ours that is not finished: the server stops, the deadline
  // passed, or the caller went away.
  absl::Status WhyCut(const CallDeadline& deadline) const;
  // The deadline of a call that begins now.
  CallDeadline DeadlineOf(const grpc::CallbackServerContext& context) const;
  // From here on gRPC ends calls because the server stops.
  void SetStopping() { stopping_ = true; }
  bool stopping() const { return stopping_; }

  // The ledger, with refusals counted.
  absl::StatusOr<ByteReservation> Reserve(int64_t bytes);

  // Requires CheckReady().ok().
  const std::vector<const ServedModel*>& models() const { return *models_.load(); }
  // NotFound names the models there are; "" means the only one.
  absl::StatusOr<const ServedModel*> FindModel(const std::string& name) const;

  void SetModels(std::vector<const ServedModel*> models);
  // As GrpcServer::Drain().
  void Drain(absl::AnyInvocable<void()> on_uploaded);

 private:
  absl::Status CheckMetadata(const grpc::CallbackServerContext& call) const;

  std::vector<const ServedModel*> model_list_;
  std::atomic<const std::vector<const ServedModel*>*> models_{nullptr};
  std::atomic<bool> draining_{false};
  std::atomic<bool> stopping_{false};
};

}  // namespace pbs::server
