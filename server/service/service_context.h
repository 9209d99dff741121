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

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/base/block_cache.h"
#include "server/engine/served_model.h"
#include "server/service/open_calls.h"
#include "server/service/options.h"
#include "server/service/parts.h"
#include "server/service/task_pool.h"

namespace pbs::server {

// Freed tensors that are kept for the next upload: at most this, and an eighth of the
// ledger.
inline constexpr int64_t kUploadBlockBytesMax = int64_t{512} << 20;

// One of upload_requests_max; gives it back when destroyed. Move-only.
class UploadSlot {
 public:
  UploadSlot() = default;
  UploadSlot(UploadSlot&& other) noexcept { *this = std::move(other); }
  UploadSlot& operator=(UploadSlot&& other) noexcept;
  ~UploadSlot() { Reset(); }
  void Reset();

 private:
  friend class ServiceContext;
  explicit UploadSlot(std::atomic<int32_t>* held) : held_(held) {}
  std::atomic<int32_t>* held_ = nullptr;
};

class ServiceContext {
 public:
  ServiceContext(const ServiceOptions& service_options,
                 const ServiceParts& service_parts)
      : options(service_options), parts(service_parts) {}

  const ServiceOptions options;
  const ServiceParts parts;
  BlockCache upload_blocks{
      std::min(kUploadBlockBytesMax, parts.ledger.bytes_max() / 8)};
  OpenCalls open_calls;
  TaskPool movers{2};      // make chunks when the executor has published something
  TaskPool background{1};  // checks and generators that take longer than a call may

  // Unavailable while models are loading.
  absl::Status CheckReady() const;
  // CheckReady(), and Unavailable while draining. Counts refusals.
  absl::Status CheckAdmitting() const;
  // ResourceExhausted when upload_requests_max uploads are under way.
  absl::StatusOr<UploadSlot> TakeUploadSlot();

  // The ledger, with refusals counted.
  absl::StatusOr<ByteReservation> Reserve(int64_t bytes);

  // Requires CheckReady().ok().
  const std::vector<const ServedModel*>& models() const { return *models_.load(); }
  // NotFound names the models there are; "" means the only one.
  absl::StatusOr<const ServedModel*> FindModel(const std::string& name) const;

  void SetModels(std::vector<const ServedModel*> models);
  void Drain() { draining_ = true; }

 private:
  std::vector<const ServedModel*> model_list_;
  std::atomic<const std::vector<const ServedModel*>*> models_{nullptr};
  std::atomic<bool> draining_{false};
  std::atomic<int32_t> uploads_{0};
};

}  // namespace pbs::server
