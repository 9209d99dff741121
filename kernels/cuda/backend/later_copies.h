// Copies on a separate stream and thread: keys and values of a layer are downloaded,
// and tensors of a request are uploaded, while other work runs.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "cuda/backend/driver.h"
#include "cuda/backend/staging_ring.h"

namespace pbs::cuda {

// Copies go through a staging ring one after the other, without a gap: a copy begins
// while the last parts of the one before are still under way.
//
// Threading: Add() from any thread. Memory: a staging ring.
class LaterCopies {
 public:
  // `stream` decides the direction: kUpload or kDownload.
  static StatusOr<std::unique_ptr<LaterCopies>> Create(Driver& driver, StreamId stream);
  // Waits for all added copies.
  ~LaterCopies();
  LaterCopies(const LaterCopies&) = delete;
  LaterCopies& operator=(const LaterCopies&) = delete;

  // As Backend::UploadLater() or DownloadLater(). Only downloads wait for earlier work
  // on kCompute. The thread calls `done`, which may call Add().
  void Add(const void* source, void* target, int64_t bytes,
           std::function<void(const Status&)> done);

 private:
  struct Copy {
    const std::byte* source;
    std::byte* target;
    int64_t bytes;
    std::function<void(const Status&)> done;
    std::optional<EventId> called = {};  // recorded after the work called before
    Status status = {};                  // the first error; no part begins after it
    int64_t begun = 0;                   // bytes begun
    int32_t under_way = 0;               // parts under way

    bool all_begun() const { return begun == bytes || !status.ok(); }
  };
  struct Part {
    Copy* copy;
    int64_t number;
    std::byte* target;
    int64_t bytes;
  };

  LaterCopies(Driver& driver, StreamId stream)
      : driver_(driver), stream_(stream), to_host_(stream == StreamId::kDownload) {}
  // Records an event after all work called so far.
  StatusOr<EventId> MarkCalled();

  // All methods below run on the thread.
  void Run();
  // Takes the next copy. Without one it returns false if copies are under way, else it
  // waits for one; false then means that the object is being destroyed.
  bool Take();
  // Begins a part of the copy that was taken last.
  void BeginPart();
  // Waits for the oldest part and calls `done` of ended copies.
  void EndPart();
  void TellEnded();

  Driver& driver_;
  const StreamId stream_;
  const bool to_host_;
  std::unique_ptr<StagingRing> ring_;
  // Used by the thread only: taken copies, oldest first, and their parts in the ring.
  std::deque<Copy> taken_;
  std::deque<Part> parts_;
  int64_t num_parts_ = 0;  // begun so far
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Copy> waiting_;     // guarded by mutex_
  std::vector<EventId> unused_;  // guarded by mutex_
  bool ending_ = false;          // guarded by mutex_
  std::thread thread_;
};

}  // namespace pbs::cuda
