// Copies on a stream and a thread of their own: a layer's keys and values leave, and
// the tensors of a request arrive, while something else runs.
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

// Copies go through a staging ring one behind the other, without a gap: the next one
// begins while the last parts of the one before it are on their way.
//
// Threading: Add() from any thread. Memory: a staging ring.
class LaterCopies {
 public:
  // `stream` says which way: kUpload or kDownload.
  static StatusOr<std::unique_ptr<LaterCopies>> Create(Driver& driver, StreamId stream);
  // After what was added.
  ~LaterCopies();
  LaterCopies(const LaterCopies&) = delete;
  LaterCopies& operator=(const LaterCopies&) = delete;

  // As Backend::UploadLater() or DownloadLater(): only those to the host come behind
  // what was enqueued on kCompute. `done` is called by the thread, and may add.
  void Add(const void* source, void* target, int64_t bytes,
           std::function<void(const Status&)> done);

 private:
  struct Copy {
    const std::byte* source;
    std::byte* target;
    int64_t bytes;
    std::function<void(const Status&)> done;
    std::optional<EventId> called = {};  // what was called before has been done
    Status status = {};                  // the first error; nothing is begun behind one
    int64_t begun = 0;                   // bytes
    int32_t under_way = 0;               // parts

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
  // An event behind what was called so far.
  StatusOr<EventId> MarkCalled();

  // All below on the thread.
  void Run();
  // Lets the next copy begin. Where there is none: false, or, when none is under way
  // either, waits; then false says that the end has come.
  bool Take();
  // Of the copy that was taken last.
  void BeginPart();
  // Waits for the oldest part, and tells whose copies have ended.
  void EndPart();
  void TellEnded();

  Driver& driver_;
  const StreamId stream_;
  const bool to_host_;
  std::unique_ptr<StagingRing> ring_;
  // The thread's: copies that were taken, oldest first, and their parts in the ring.
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
