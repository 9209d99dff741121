// Downloads on a stream and a thread of their own: a layer's keys and values leave
// while the next layer runs.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/backend/driver.h"
#include "cuda/backend/staged_copies.h"

namespace pbs::cuda {

// Threading: Add() from one thread at a time. Memory: that of its staged copies.
class LaterDownloads {
 public:
  static StatusOr<std::unique_ptr<LaterDownloads>> Create(Driver& driver);
  // After what was added.
  ~LaterDownloads();
  LaterDownloads(const LaterDownloads&) = delete;
  LaterDownloads& operator=(const LaterDownloads&) = delete;

  // As Backend::DownloadLater().
  void Add(const void* source, void* target, int64_t bytes,
           std::function<void(const Status&)> done);

 private:
  struct Download {
    const void* source;
    void* target;
    int64_t bytes;
    StatusOr<EventId> called;  // what was called before has been done
    std::function<void(const Status&)> done;
  };

  explicit LaterDownloads(Driver& driver) : driver_(driver) {}
  // An event behind what was called so far.
  StatusOr<EventId> MarkCalled();
  void Run();
  Status Copy(const Download& download);

  Driver& driver_;
  std::unique_ptr<StagedCopies> copies_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Download> waiting_;  // guarded by mutex_
  std::vector<EventId> unused_;   // guarded by mutex_
  bool ending_ = false;           // guarded by mutex_
  std::thread thread_;
};

}  // namespace pbs::cuda
