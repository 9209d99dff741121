// State that all calls of the service share.
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
#include "server/service/push_targets.h"
#include "server/service/task_pool.h"
#include "server/service/uploads.h"

namespace pbs::server {

// The most bytes of freed tensors that are kept for later uploads; an eighth of the
// ledger when that is less.
inline constexpr int64_t kUploadBlockBytesMax = int64_t{512} << 20;

class ServiceContext {
 public:
  ServiceContext(const ServiceOptions& service_options,
                 const ServiceParts& service_parts)
      : options(service_options), parts(service_parts) {}

  const ServiceOptions options;
  const ServiceParts parts;
  // shared_ptr: tensors that are being copied to a device may outlive the service.
  const std::shared_ptr<BlockCache> upload_blocks = std::make_shared<BlockCache>(
      std::min(kUploadBlockBytesMax, parts.ledger.bytes_max() / 8));
  OpenCalls open_calls;
  PushTargets push_targets{options.push_targets, options.transport};
  Uploads uploads{options.limits.upload_requests_max};
  // Make chunks when the executor has published layers or results
  TaskPool movers{2};
  // Generators and checks that take too long for gRPC's threads
  TaskPool background{1};

  // Unavailable while models are loading; InvalidArgument when the call's metadata is
  // larger than transport.metadata_bytes_max.
  absl::Status CheckReady(const grpc::CallbackServerContext& call) const;
  // As CheckReady(), and Unavailable while draining. Counts refusals because of load.
  absl::Status CheckAdmitting(const grpc::CallbackServerContext& call) const;
  // As Uploads::Take(); counts refusals.
  absl::StatusOr<Uploads::Slot> TakeUploadSlot(Uploads::End end);

  // The reason why gRPC ends an unfinished call: the server stops, the deadline has
  // passed, or the caller has gone.
  absl::Status WhyCut(const CallDeadline& deadline) const;
  // The deadline of a call that begins now.
  CallDeadline DeadlineOf(const grpc::CallbackServerContext& context) const;
  // From here on WhyCut() gives the server's stop as the reason.
  void SetStopping() { stopping_ = true; }
  bool stopping() const { return stopping_; }

  // As ByteLedger::Reserve(); counts refusals.
  absl::StatusOr<ByteReservation> Reserve(int64_t bytes);

  // Requires CheckReady().ok().
  const std::vector<const ServedModel*>& models() const { return *models_.load(); }
  // "" means the only model. NotFound names the served models.
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
