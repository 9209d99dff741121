// Copies inputs of raw attention to a device with memory of its own while other jobs
// run there. Uploads are sent one after the other in the order of Add(); an upload in
// Wait() goes first.
//
// Threading: safe from any thread; only Wait() and the destructor wait. Memory: an
// upload holds its inputs, their copies on the device and the charges for both until
// its handle is destroyed and its last copy under way has ended.
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

// Members are destroyed in reverse order.
struct UploadSource {
  JobReservation reservation;
  HostBytes q, k, v, order;
  BlockLists lists;
};

using UploadId = int64_t;

class DeviceUploads {
 public:
  // Tensors are sent in parts of this size. A part under way can be neither stopped nor
  // overtaken.
  static constexpr int64_t kPartBytes = int64_t{16} << 20;
  static constexpr int32_t kPartsUnderWay = 2;  // over all uploads

  class Upload;
  struct Drop {
    DeviceUploads* uploads = nullptr;
    void operator()(Upload* upload) const { uploads->OnDropped(*upload); }
  };
  // Destroying the handle stops the upload: no further part is sent.
  using Handle = std::unique_ptr<Upload, Drop>;

  explicit DeviceUploads(Backend& backend);
  // Waits for parts under way. All handles must be destroyed before.
  ~DeviceUploads();
  DeviceUploads(const DeviceUploads&) = delete;
  DeviceUploads& operator=(const DeviceUploads&) = delete;

  // Adds an upload, which starts at Begin() or Wait(). The sources of `copies` are in
  // `source`.
  Handle Add(UploadSource source, std::vector<TensorCopy> copies);
  static UploadId IdOf(const Handle& handle);
  // Starts the upload; no-op when its handle was destroyed.
  void Begin(UploadId id);
  // Sends this upload before others, waits until all its copies are on the device and
  // returns them; they live as long as the handle. On failure returns the first error,
  // or Cancelled soon after `control.stop` turns true.
  absl::StatusOr<std::span<const TensorCopy>> Wait(const Handle& handle,
                                                   const RunControl& control);

 private:
  struct Part {
    Upload* upload;
    const std::byte* source;  // null: allocates the copies
    std::byte* target;
    int64_t bytes;
  };

  void OnDropped(Upload& upload);
  // Takes the parts that may be sent now and counts them as under way.
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
