#include "server/engine/device_uploads.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "pbs/check.h"
#include "server/base/status.h"

namespace pbs::server {

// All but `id`, `source` and, once its memory is allocated, `copies` is guarded by the
// mutex.
class DeviceUploads::Upload {
 public:
  enum class Allocation : uint8_t { kNone, kRequested, kDone };

  Upload(UploadId upload_id, UploadSource inputs, std::vector<TensorCopy> tensors)
      : id(upload_id), source(std::move(inputs)), copies(std::move(tensors)) {}

  bool all_sent() const {
    return allocation == Allocation::kDone && next == copies.size();
  }
  bool has_part() const {
    return begun && !dropped && status.ok() && allocation != Allocation::kRequested &&
           !all_sent();
  }
  bool ended() const { return under_way == 0 && (!status.ok() || all_sent()); }

  // Requires has_part().
  Part TakePart() {
    ++under_way;
    if (allocation == Allocation::kNone) {
      allocation = Allocation::kRequested;
      return {this, nullptr, nullptr, 0};
    }
    const TensorCopy& copy = copies[next];
    const Part part = {this, static_cast<const std::byte*>(copy.source) + next_offset,
                       static_cast<std::byte*>(copy.target.data()) + next_offset,
                       std::min(kPartBytes, copy.bytes - next_offset)};
    next_offset += part.bytes;
    if (next_offset == copy.bytes) {
      ++next;
      next_offset = 0;
    }
    return part;
  }

  const UploadId id;
  UploadSource source;
  std::vector<TensorCopy> copies;
  bool begun = false;
  bool dropped = false;
  Allocation allocation = Allocation::kNone;
  size_t next = 0;          // copy to be sent
  int64_t next_offset = 0;  // in it
  int32_t under_way = 0;    // parts
  Status status;            // the first error
};

DeviceUploads::DeviceUploads(Backend& backend) : backend_(backend) {}

DeviceUploads::~DeviceUploads() {
  MutexLock lock(mutex_);
  while (under_way_ > 0) changed_.Wait(mutex_);
  PBS_CHECK(uploads_.empty());
}

DeviceUploads::Handle DeviceUploads::Add(UploadSource source,
                                         std::vector<TensorCopy> copies) {
  MutexLock lock(mutex_);
  uploads_.push_back(
      std::make_unique<Upload>(++last_id_, std::move(source), std::move(copies)));
  return Handle(uploads_.back().get(), Drop{this});
}

UploadId DeviceUploads::IdOf(const Handle& handle) { return handle->id; }

void DeviceUploads::Begin(UploadId id) {
  std::vector<Part> parts;
  {
    MutexLock lock(mutex_);
    for (const auto& upload : uploads_) {
      if (upload->id == id) upload->begun = true;
    }
    parts = TakeParts();
  }
  Send(parts);
}

absl::StatusOr<std::span<const TensorCopy>> DeviceUploads::Wait(
    const Handle& handle, const RunControl& control) {
  Upload& upload = *handle;
  std::vector<Part> parts;
  {
    MutexLock lock(mutex_);
    upload.begun = true;
    const auto at = std::ranges::find(uploads_, &upload, &std::unique_ptr<Upload>::get);
    std::rotate(uploads_.begin(), at, at + 1);
    parts = TakeParts();
  }
  Send(parts);
  MutexLock lock(mutex_);
  while (!upload.ended()) {
    if (control.stop != nullptr && control.stop->load(std::memory_order_relaxed)) {
      return absl::CancelledError("an upload stopped by its caller");
    }
    changed_.Wait(mutex_);
  }
  PBS_ABSL_RETURN_IF_ERROR(ToAbsl(upload.status));
  return std::span<const TensorCopy>(upload.copies);
}

void DeviceUploads::OnDropped(Upload& upload) {
  std::unique_ptr<Upload> ended;  // freed after the lock is released
  MutexLock lock(mutex_);
  upload.dropped = true;
  if (upload.under_way == 0) ended = Remove(upload);
}

std::unique_ptr<DeviceUploads::Upload> DeviceUploads::Remove(const Upload& upload) {
  const auto at = std::ranges::find(uploads_, &upload, &std::unique_ptr<Upload>::get);
  std::unique_ptr<Upload> removed = std::move(*at);
  uploads_.erase(at);
  return removed;
}

std::vector<DeviceUploads::Part> DeviceUploads::TakeParts() {
  std::vector<Part> parts;
  for (const auto& upload : uploads_) {
    while (under_way_ < kPartsUnderWay && upload->has_part()) {
      ++under_way_;
      parts.push_back(upload->TakePart());
    }
  }
  return parts;
}

// What was taken counts as under way: until the last of it has ended, so does this.
void DeviceUploads::Send(const std::vector<Part>& parts) {
  for (const Part& part : parts) {
    backend_.UploadLater(part.source, part.target, part.bytes,
                         [this, part](const Status& sent) { OnSent(part, sent); });
  }
}

void DeviceUploads::OnSent(const Part& part, const Status& sent) {
  Upload& upload = *part.upload;
  Status status = sent;
  if (status.ok() && part.source == nullptr) status = MakeRoom(upload);
  std::unique_ptr<Upload> ended;
  {
    MutexLock lock(mutex_);
    if (upload.status.ok()) upload.status = status;
    if (part.source == nullptr) upload.allocation = Upload::Allocation::kDone;
    --upload.under_way;
    if (upload.dropped && upload.under_way == 0) ended = Remove(upload);
  }
  ended.reset();  // before the destructor may go on
  std::vector<Part> parts;
  {
    MutexLock lock(mutex_);
    --under_way_;
    parts = TakeParts();
    changed_.NotifyAll();
  }
  Send(parts);
}

// On the thread that copies: memory may have to be waited for.
Status DeviceUploads::MakeRoom(Upload& upload) {
  {
    MutexLock lock(mutex_);
    if (upload.dropped) return OkStatus();
  }
  for (TensorCopy& copy : upload.copies) {
    PBS_ASSIGN_OR_RETURN(copy.target, backend_.AllocateForUpload(copy.bytes));
  }
  return OkStatus();
}

}  // namespace pbs::server
