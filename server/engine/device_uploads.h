// Inputs of raw attention on their way to a device with memory of its own, while other
// jobs run there: upload by upload, in the order of Add(), but first of all what
// somebody waits for.
//
// Threading: safe from any thread; only Wait() and the destructor wait. Memory: an
// upload holds its inputs, their copies on the device, and what was charged for both,
// until its handle is gone and nothing of it is under way any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "pbs/attention.h"
#include "pbs/backend.h"
#include "server/base/host_bytes.h"
#include "server/base/mutex.h"
#include "server/engine/device_tensors.h"
#include "server/engine/engine.h"

namespace pbs::server {

// In the order in which they are made; they end in reverse.
struct UploadSource {
  JobReservation reservation;
  HostBytes q, k, v, order;
  BlockLists lists;
};

using UploadId = int64_t;

class DeviceUploads {
 public:
  // Tensors go in parts of this size. What is under way can be neither stopped nor
  // overtaken.
  static constexpr int64_t kPartBytes = int64_t{16} << 20;
  static constexpr int32_t kPartsUnderWay = 2;  // of all uploads

  class Upload;
  struct Drop {
    DeviceUploads* uploads = nullptr;
    void operator()(Upload* upload) const { uploads->OnDropped(*upload); }
  };
  // Dropped, an upload begins nothing more.
  using Handle = std::unique_ptr<Upload, Drop>;

  explicit DeviceUploads(Backend& backend);
  // Waits for what is under way; handles must be gone.
  ~DeviceUploads();
  DeviceUploads(const DeviceUploads&) = delete;
  DeviceUploads& operator=(const DeviceUploads&) = delete;

  // Nothing happens before Begin() or Wait(). The sources of `copies` lie in `source`.
  Handle Add(UploadSource source, std::vector<TensorCopy> copies);
  static UploadId IdOf(const Handle& handle);
  // Lets the upload begin; no-op when it was dropped.
  void Begin(UploadId id);
  // Waits until all copies are on the device, before those of others, and gives them;
  // they live as long as the handle. The error of the first that failed, or Cancelled,
  // soon, when `control.stop` turns true.
  absl::StatusOr<std::span<const TensorCopy>> Wait(const Handle& handle,
                                                   const RunControl& control);

 private:
  struct Part {
    Upload* upload;
    const std::byte* source;  // null: room for the copies
    std::byte* target;
    int64_t bytes;
  };

  void OnDropped(Upload& upload);
  // What may be sent now, counted as under way.
  std::vector<Part> TakeParts() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Send(const std::vector<Part>& parts);
  void OnSent(const Part& part, const Status& sent);
  Status MakeRoom(Upload& upload);
  std::unique_ptr<Upload> Remove(const Upload& upload)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Backend& backend_;
  Mutex mutex_;
  CondVar changed_;
  UploadId last_id_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t under_way_ ABSL_GUARDED_BY(mutex_) = 0;  // parts
  // In the order in which they are sent.
  std::vector<std::unique_ptr<Upload>> uploads_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pbs::server
